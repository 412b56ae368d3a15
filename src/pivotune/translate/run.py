"""Translate the rows of a source: English rows in, translated rows appended to a file, the good ones written at the end.

Beside `pairs.jsonl` lie `pairs.translated.jsonl`, all rows as they were translated, with `pairs.translated.json`, their
settings, `pairs.scores.jsonl`, scores of filters, and `pairs.report.json`, the rows left out. A stopped translation goes
on behind its last row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pivotune.data.check import DataCheck, check_rows, report_path, row_record, write_clean
from pivotune.data.formats import row_name
from pivotune.data.lazy import Mapped, Subset
from pivotune.data.rows import Row
from pivotune.data.sources import Rows, load_rows
from pivotune.errors import UsageError
from pivotune.text.files import write_json
from pivotune.translate.filters import RowFilter
from pivotune.translate.segments import Translate, translate_texts

# Rows that show under which keys a source has its English.
_SAMPLE = 1000
# Lines whose translations are remembered; instructions repeat over the whole file.
_KNOWN_LINES = 200_000


def translated_path(out: Path) -> Path:
    """Return the place of all translated rows: `pairs.translated.jsonl` for `pairs.jsonl`."""
    return out.with_suffix(".translated.jsonl")


def scores_path(out: Path) -> Path:
    """Return the place of the scores of filters: `pairs.scores.jsonl` for `pairs.jsonl`."""
    return out.with_suffix(".scores.jsonl")


def read_english(source: str, limit: int | None) -> Rows:
    """Read rows whose English stands under plain keys, or under those with `_en` if the source has such.

    Rows without a prompt or an answer are left out and counted.
    """
    options: dict[str, Any] = {"on_bad_row": "skip", "needed_by": "data translate"}
    sample = load_rows(source, need_target=False, need_english=False, limit=_SAMPLE, **options)
    has_english = any(row.prompt_en for row in sample)
    rows = load_rows(source, need_target=not has_english, need_english=has_english, limit=limit, **options)
    return replace(rows, rows=Mapped(rows.rows, lambda place, row: _english_row(row, has_english)))


def _english_row(row: Row, has_english: bool) -> Row:
    side = row.sides[has_english]
    english = Row("", "", side.prompt, side.completion, "", side.input, (), side.history)
    return replace(english, id=row.id, number=row.number)


def count_done(out: Path, rows: Rows, settings: Mapping[str, str | None]) -> int:
    """Return the number of rows that are translated already; a last line that was cut off by a kill is removed.

    Raises:
        UsageError: a file in the place of ours, or a translation of other rows or with other settings.
    """
    done, described = translated_path(out), translated_path(out).with_suffix(".json")
    hint = "name another file, or replace it with --overwrite"
    if not described.is_file():
        if found := next((path for path in (out, done) if path.exists()), None):
            raise UsageError(f"--out: {found} exists and is no translation begun by this command; {hint}")
        return 0
    try:
        begun = dict(json.loads(described.read_text(encoding="utf-8")))
        content = done.read_bytes() if done.is_file() else b""
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{described}: cannot be read: {error}; {hint}") from error
    whole = content.rfind(b"\n") + 1
    for key, value in settings.items():
        if whole and begun.get(key) != value:
            raise UsageError(f"--out: {out} was begun with {key} {begun.get(key)!r}, found {value!r}; {hint}")
    if whole < len(content):
        os.truncate(done, whole)
    translated = load_rows(done) if whole else []
    for row, english in zip(translated, rows, strict=False):
        # Of a conversation the input is read back as a part of the prompt.
        expected = (
            replace(english, prompt_en=english.sides[1].user_text, input_en="") if english.history_en else english
        )
        if (row.id, _texts(row)) != (english.id, _texts(expected)):
            raise UsageError(
                f"--out: {done}, row {row.number} does not translate row {english.number} of the data; {hint}"
            )
    return min(len(translated), len(rows))


def begin(out: Path, settings: Mapping[str, str | None], *, overwrite: bool) -> None:
    """Write the settings; the files of an earlier translation are removed or kept."""
    files = (out, report_path(out), translated_path(out), scores_path(out))
    for path in files if overwrite else ():
        path.unlink(missing_ok=True)
    write_json(translated_path(out).with_suffix(".json"), settings)


def translate_rows(
    out: Path, rows: Rows, done: int, translate: Translate, rows_per_step: int, progress: Callable[[int], None]
) -> None:
    """Append the rows behind the first `done` ones, each with its translation.

    Args:
        progress: called with the number of rows done so far.
    """
    known: dict[str, str] = {}
    remaining = islice(iter(rows), done, None)
    progress(done)
    with translated_path(out).open("ab") as file:
        while step := list(islice(remaining, rows_per_step)):
            if len(known) > _KNOWN_LINES:
                known.clear()
            texts = [_texts(row) for row in step]
            translated = iter(translate_texts([text for one in texts for text in one], translate, known))
            for row, english in zip(step, texts, strict=True):
                record = row_record(_with_target(row, list(islice(translated, len(english)))))
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            done += len(step)
            progress(done)


def _texts(row: Row) -> list[str]:
    """Return the English texts of a row in a fixed order."""
    return [row.prompt_en, row.completion_en, row.input_en, *(turn["content"] for turn in row.history_en)]


def _with_target(row: Row, texts: list[str]) -> Row:
    prompt, completion, input_text, *turns = texts
    history = tuple({**turn, "content": text} for turn, text in zip(row.history_en, turns, strict=True))
    return replace(row, prompt=prompt, completion=completion, input=input_text, history=history)


def translated_rows(out: Path, rows: Rows) -> Rows:
    """Return the translations of `rows`, with the numbers of these."""
    translated = Subset(load_rows(translated_path(out)), np.arange(len(rows)))
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
