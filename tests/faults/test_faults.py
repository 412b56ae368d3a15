"""The fault table on real processes. `make faults` does all of it, with 30 kills; here a part, for its time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.scenarios import SCENARIOS, kill_at_files, kill_at_random
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


def test_killed_before_each_rename_and_resumed(server, tmp_path):
    """`make faults` kills before each change of a file."""
    kill_at_files(Workshop(server, tmp_path), renames_only=True)


def test_the_document_and_the_table_agree():
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {name: promise for name, promise in rows if name in SCENARIOS} == {
        name: scenario.promise for name, scenario in SCENARIOS.items()
    }
