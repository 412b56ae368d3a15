from __future__ import annotations

import pytest

from pivotune.config.yaml_text import load_config
from pivotune.errors import UsageError

_FEW = """\
model: &name base
data: {train: *name}
output_dir: *name
"""


def test_aliases_are_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(_FEW)
    assert load_config(path).data.train == "base"


def test_aliases_of_aliases_do_not_fill_the_memory(tmp_path):
    """Nine of each in the next one: a few hundred bytes that would be written out as a billion."""
    lines = ["model: base", "training:", "  a0: &a0 [x, x]"]
    lines += [f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(UsageError, match=r"line 6.*more than 20 aliases"):
        load_config(path)
