"""The fault table on real processes: a part of it usually, all of it under the marker `exhaustive`.

Of the kills at random moments and before changes of files every sixth is tried; `make faults` tries them all.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from faults.scenarios import SCENARIOS, changes_of_files, check_killed_at_file, kill_at_random
from faults.workshop import Workshop

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


def marked() -> list:
    slow = (pytest.mark.slow, pytest.mark.exhaustive)
    return [pytest.param(each, id=each.name, marks=() if each.quick else slow) for each in SCENARIOS.values()]


@pytest.mark.parametrize("scenario", marked())
def test_promise_is_kept(tmp_path, scenario):
    scenario.attempt(Workshop(tmp_path, every=6))


def test_killed_at_any_moment_and_resumed(tmp_path):
    """`kill -9 at any moment` does it 30 times."""
    kill_at_random(Workshop(tmp_path), 1, seed=1)


# Renamed to these names when complete, in this order; one checkpoint of several.
RENAMED = ("config.yaml", "environment.json", "rows.json", "layers.json", "start-scores.json", "checkpoint-4",
           "results.items.jsonl.gz", "results.json", "README.md", "model")  # fmt: skip


@pytest.mark.parametrize("name", ["rows.json", "checkpoint-4", "model"])
def test_killed_before_a_rename_and_resumed(tmp_path, name):
    """`kill -9 before each change of a file` does it for all."""
    check_killed_at_file(Workshop(tmp_path), 0, f" -> {tmp_path / 'killed-0' / name}", f"renaming {name}")


def test_no_other_file_is_renamed(tmp_path):
    found = changes_of_files(Workshop(tmp_path), "os.rename ")
    names = [line.rpartition(" -> ")[2] for line in found]
    expected = {tmp_path / "counted" / name for name in (*RENAMED, "checkpoint-2", "checkpoint-6")}
    assert sorted(names) == sorted(map(str, expected))


def test_the_document_and_the_table_agree():
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {name: promise for name, promise in rows if name in SCENARIOS} == {
        name: scenario.promise for name, scenario in SCENARIOS.items()
    }
