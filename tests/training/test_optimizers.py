from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers.training_args import OptimizerNames

from pivotune.config.yaml_text import parse_config
from pivotune.errors import UsageError
from pivotune.training.arguments import build_arguments
from pivotune.training.optimizers import _NEEDS


def arguments(optim, **options):
    settings = {"model": "m", "data": {"train": "t"}, "output_dir": "o", "training": {"optim": optim, "use_cpu": True}}
    return build_arguments(parse_config(settings), **options)


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_optimizers_of_torch_pass(name):
    assert arguments(name).optim == name


@pytest.mark.parametrize(("found", "nearest"), [("adamw_8bits", "adamw_8bit"), ("adam_torch", "adamw_torch"), (3, "")])
def test_unknown_names_get_the_nearest(found, nearest):
    with pytest.raises(UsageError, match=r"training\.optim: .* is not allowed; (did you mean|allowed:)") as raised:
        arguments(found)
    assert nearest in str(raised.value)


def test_a_missing_package_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(UsageError, match=r"training\.optim: adamw_8bit needs .* pip install bitsandbytes"):
        arguments("adamw_8bit")
    assert arguments("adamw_8bit", here=False).optim == "adamw_8bit"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_paged_states_need_cuda(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "bitsandbytes" else found(name))
    with pytest.raises(UsageError, match="paged_adamw_8bit needs a CUDA device and none is found"):
        arguments("paged_adamw_8bit")


def test_every_name_that_needs_something_is_known():
    assert set(_NEEDS) <= {name.value for name in OptimizerNames}
