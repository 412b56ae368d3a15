"""The fault table on real processes. `make faults` does all of it, with 30 kills; here a part, for its time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.scenarios import SCENARIOS, changes_of_files, check_killed_at_file, kill_at_random
from faults.workshop import Server, Workshop

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


def marked() -> list:
    slow = pytest.mark.slow
    return [
        pytest.param(s, id=s.name, marks=() if s.quick else slow) for s in SCENARIOS.values() if "kill -9" not in s.name
    ]


@pytest.mark.parametrize("scenario", marked())
def test_promise_is_kept(server, tmp_path, scenario):
    scenario.attempt(Workshop(server, tmp_path))


def test_killed_at_any_moment_and_resumed(server, tmp_path):
    """`make faults` kills 30 runs."""
    kill_at_random(Workshop(server, tmp_path), 3, seed=1)


# Of what is put in place under its name when it is whole, in that order; of checkpoints one.
RENAMED = ("config.yaml", "environment.json", "rows.json", "layers.json", "start-scores.json", "checkpoint-4",
           "results.items.jsonl.gz", "results.json", "README.md", "model")  # fmt: skip


@pytest.mark.parametrize("name", RENAMED)
def test_killed_before_a_rename_and_resumed(server, tmp_path, name):
    """`make faults` kills before each change of a file."""
    check_killed_at_file(Workshop(server, tmp_path), 0, f" -> {tmp_path / 'killed-0' / name}", f"renaming {name}")


def test_no_other_file_is_renamed(server, tmp_path):
    found = changes_of_files(Workshop(server, tmp_path), "os.rename ")
    names = [line.rpartition(" -> ")[2] for line in found]
    expected = {tmp_path / "counted" / name for name in (*RENAMED, "checkpoint-2", "checkpoint-6")}
    assert sorted(names) == sorted(map(str, expected))


def test_the_document_and_the_table_agree():
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {name: promise for name, promise in rows if name in SCENARIOS} == {
        name: scenario.promise for name, scenario in SCENARIOS.items()
    }
