"""Files that are whole or not there."""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from pivotune.text.files import write_items, write_json, write_text
from pivotune.training.kept_arrays import save_arrays
from pivotune.training.resilience.checkpoints import staged_folder


def test_content_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, done = tmp_path / "rows.json", []
    for name in ("fsync", "replace"):
        inner = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, n=name, f=inner: (done.append(n), f(*args)))
    write_text(path, "new")
    assert done == ["fsync", "replace"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "rows.json", "new")
        with staged_folder(tmp_path / "model") as folder:
            save_file({"weight": np.zeros(2)}, folder / "model.safetensors")
        save_arrays(tmp_path / "lens.safetensors", {"map": np.zeros(2)}, {})
    finally:
        os.umask(before)
    for name in ("rows.json", "model/model.safetensors", "lens.safetensors"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode


def test_readers_never_see_half_a_file(tmp_path):
    """A process killed while writing leaves the old file."""
    path = tmp_path / "results.json"
    write_text(path, "old")
    code = (
        "import os, sys; from pathlib import Path; from pivotune.text import files;"
        "files.os.replace = lambda *a: os.kill(os.getpid(), 9);"
        "files.write_text(Path(sys.argv[1]), 'new')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code, str(path)], env=environment, check=False).returncode == -9
    assert path.read_text() == "old"


def test_json_stays_json(tmp_path):
    write_json(tmp_path / "a.json", {"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf}, "d": "größer"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, [None, 1.5]], "b": {"c": None}, "d": "größer"}
    assert "größer" in text


def test_items_are_gzipped_lines(tmp_path):
    items = [{"item": index, "text": "größer"} for index in range(3)]
    write_items(tmp_path / "items.jsonl.gz", items)
    with gzip.open(tmp_path / "items.jsonl.gz", "rt", encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == items
