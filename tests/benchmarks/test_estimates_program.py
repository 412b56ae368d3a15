"""`benchmarks/estimates.py` and the table in docs/scaling.md that it makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.estimates import table_row

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_document_has_what_the_program_prints():
    """But for what another version of torch may change."""
    (row,) = (line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| SmolLM2-135M |"))
    written, found = cells(row), cells(table_row("smollm2"))
    assert written[:2] == found[:2]
    assert list(map(float, written[2:])) == pytest.approx(list(map(float, found[2:])), abs=0.15)
