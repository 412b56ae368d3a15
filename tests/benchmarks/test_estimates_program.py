"""`benchmarks/estimates.py` and the table in docs/scaling.md that it makes."""

from __future__ import annotations

from pathlib import Path

from benchmarks.estimates import table_row

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"


def test_the_document_has_what_the_program_prints():
    assert table_row("smollm2") in DOCUMENT.read_text(encoding="utf-8").splitlines()
