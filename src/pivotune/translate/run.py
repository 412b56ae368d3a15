"""Translate the rows of a source: English rows in, translated rows appended to a file, the good ones written at the end.

Beside `pairs.jsonl` lie `pairs.translated.jsonl`, all rows as they were translated, with `pairs.translated.json`, their
settings, `pairs.scores.jsonl`, scores of filters, and `pairs.report.json`, the rows left out. A stopped translation goes
on behind its last row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pivotune.data.check import DataCheck, check_rows, row_record, write_clean
from pivotune.data.formats import row_name
from pivotune.data.lazy import Mapped, Subset
from pivotune.data.rows import ENGLISH_SUFFIX, Row
from pivotune.data.sources import Rows, load_rows
from pivotune.translate.filters import RowFilter
from pivotune.translate.segments import Translate, translate_texts
from pivotune.translate.steps import StepFile

# Rows that show under which keys a source has its English.
_SAMPLE = 1000
# Lines whose translations are remembered; instructions repeat over the whole file.
_KNOWN_LINES = 200_000


def load_english(source: str, limit: int | None, needed_by: str) -> Rows:
    """Read rows with English under keys with `_en`, or rows whose plain keys are English, which becomes the English side.

    Rows without an English prompt or answer are left out and counted.
    """
    options: dict[str, Any] = {"on_bad_row": "skip", "needed_by": needed_by}
    sample = load_rows(source, need_target=False, need_english=False, limit=_SAMPLE, **options)
    has_english = any(row.prompt_en for row in sample)
    rows = load_rows(source, need_target=not has_english, need_english=has_english, limit=limit, **options)
    return rows if has_english else _english_alone(rows, 0)


def read_english(source: str, limit: int | None) -> Rows:
    """Read the English side of rows alone (`load_english`)."""
    return _english_alone(load_english(source, limit, "data translate"), 1)


def _english_alone(rows: Rows, english: int) -> Rows:
    """Return the rows with one of their two sides as the English one, and no other."""

    def alone(place: int, row: Row) -> Row:
        side = row.sides[english]
        return Row("", "", side.prompt, side.completion, "", side.input, (), side.history, row.id, row.number)

    return replace(rows, rows=Mapped(rows.rows, alone))


def english_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the id and the English texts of a record, under plain keys."""
    return {
        key.removesuffix(ENGLISH_SUFFIX): value
        for key, value in record.items()
        if key == "id" or key.endswith(ENGLISH_SUFFIX)
    }


def is_translation_of(record: Mapping[str, Any], row: Row) -> bool:
    """Return True if a translated record has the row's id and English texts."""
    return english_record(record) == english_record(row_record(row))


def translate_rows(
    steps: StepFile, rows: Rows, done: int, translate: Translate, rows_per_step: int, progress: Callable[[int], None]
) -> None:
    """Append the rows behind the first `done` ones, each with its translation (`StepFile.append`)."""
    known: dict[str, str] = {}

    def translated(step: list[Row]) -> list[dict[str, Any]]:
        if len(known) > _KNOWN_LINES:
            known.clear()
        english = [row.sides[1] for row in step]
        found = iter(translate_texts([text for turn in english for text in turn.texts], translate, known))
        turns = [turn.with_texts(list(islice(found, len(turn.texts)))) for turn in english]
        # The fields of a turn have the names of a row's target side.
        return [row_record(replace(row, **asdict(turn))) for row, turn in zip(step, turns, strict=True)]

    steps.append(rows, done, translated, rows_per_step, progress)


def translated_rows(steps: StepFile, rows: Rows) -> Rows:
    """Return the translations of `rows`, with the numbers of these."""
    translated = Subset(load_rows(steps.path), np.arange(len(rows)))
    return replace(rows, rows=Mapped(translated, lambda place, row: replace(row, number=rows[place].number)))


def write_result(
    out: Path, pairs: Rows, language: str, *, keep_all: bool, examples: int, filters: Sequence[RowFilter] = ()
) -> tuple[DataCheck, int]:
    """Check all translated rows, write those without defects (or all) and the report; return the check and their number."""
    found = check_rows(pairs, language=language, examples=examples)
    details: dict[int | str, dict[str, float]] = {}
    for each in filters:
        found = each.flag(found, pairs, examples)
        for place in each.low():
            details.setdefault(row_name(pairs[place].number, pairs.sources), {})[each.name] = each.scores[place]
    return found, write_clean(out, pairs, found, keep_all=keep_all, details=details)
