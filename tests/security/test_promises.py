"""Each promise of docs/security.md names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

FOLDER = Path(__file__).parent
DOCUMENT = FOLDER.parents[1] / "docs" / "security.md"


def existing() -> set[str]:
    return {
        f"{path.name}::{node.name}"
        for path in FOLDER.parent.rglob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_promise_names_existing_tests():
    text = DOCUMENT.read_text(encoding="utf-8")
    promises = [line for line in text.splitlines() if line.startswith("| **")]
    assert len(promises) >= 14
    for line in promises:
        named = re.findall(r"`(test_\w+\.py::\w+)`", line)
        assert named, line
        assert set(named) <= existing(), line
