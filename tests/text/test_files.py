"""Files that are whole or not there."""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys

import pytest

from pivotune.text.files import write_items, write_json, write_text


def test_content_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, done = tmp_path / "rows.json", []
    for name in ("fsync", "replace"):
        inner = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, n=name, f=inner: (done.append(n), f(*args)))
    write_text(path, "new")
    assert done == ["fsync", "replace"]


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
