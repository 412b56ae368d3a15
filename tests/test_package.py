from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pivotune

HEAVY = ("torch", "transformers", "numpy", "datasets", "altair", "peft", "pydantic")


def test_every_public_name_is_there():
    assert len(set(pivotune.__all__)) == len(pivotune.__all__)
    for name in pivotune.__all__:
        assert getattr(pivotune, name) is not None
    namespace: dict[str, object] = {}
    exec("from pivotune import *", namespace)
    assert set(pivotune.__all__) <= set(namespace)


def test_names_known_to_type_checkers_are_the_exported_ones():
    tree = ast.parse(Path(pivotune.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.asname: node.module for node in block.body for alias in node.names}
    assert typed == pivotune._EXPORTS


def test_the_trainer_and_its_arguments():
    from transformers import Trainer, TrainingArguments

    from pivotune import DeepSupervisionConfig, DeepSupervisionTrainer, UsageError

    assert issubclass(DeepSupervisionTrainer, Trainer)
    assert issubclass(DeepSupervisionConfig, TrainingArguments)
    assert issubclass(UsageError, ValueError)


def test_unknown_attribute():
    with pytest.raises(AttributeError, match=r"^module 'pivotune' has no attribute 'DeepSupervisonTrainer'$"):
        _ = pivotune.DeepSupervisonTrainer
    with pytest.raises(ImportError, match="cannot import name 'nothing' from 'pivotune'"):
        from pivotune import nothing  # noqa: F401


def test_importing_the_package_imports_nothing_heavy():
    script = f"import sys, pivotune; print([name for name in {HEAVY} if name in sys.modules], pivotune.__version__)"
    result = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["[]", pivotune.__version__]
