"""The rows without defects as a file, and a report of the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pivotune.data.check.result import DataCheck
from pivotune.data.formats import row_name
from pivotune.data.rows import ENGLISH_SUFFIX, Row
from pivotune.data.sources import Rows
from pivotune.errors import UsageError
from pivotune.text.files import write_json, write_jsonl


def check_clean_path(path: Path, *sources: str | None, option: str = "--write-clean") -> None:
    """Refuse a path that cannot become the file of clean rows.

    Raises:
        UsageError: no `.jsonl` file, a folder, a missing folder, or one of the files that are read.
    """
    if path.is_dir():
        raise UsageError(f"{option}: {path} is a folder; name a file that ends in .jsonl")
    if path.suffix != ".jsonl":
        raise UsageError(f"{option}: {path} found; allowed: a file name that ends in .jsonl")
    if not path.parent.is_dir():
        raise UsageError(f"{option}: no folder {path.parent}")
    written = {path.resolve(), report_path(path).resolve()}
    if any(source is not None and Path(source).resolve() in written for source in sources):
        raise UsageError(f"{option}: {path} would replace the data that is read; name another file")


def report_path(path: Path) -> Path:
    """Return the place of the report beside the clean rows: `out.report.json` for `out.jsonl`."""
    return path.with_suffix(".report.json")


def write_clean(
    path: Path,
    rows: Rows,
    check: DataCheck,
    *,
    keep_all: bool = False,
    details: Mapping[int | str, Mapping[str, Any]] | None = None,
) -> int:
    """Write the rows without defects as JSON Lines, and the report; return the number of rows written.

    The report names each row that is left out with the kinds of its defects, and counts the rows that could not be used.
    With `keep_all` rows with defects are written too, and named as `flagged`. `details` by row number go into the report.
    """
    reasons: dict[int | str, list[str]] = {}
    for problem in check.problems:
        for number in problem.numbers if problem.defect else ():
            reasons.setdefault(number, []).append(problem.name)
    flagged: list[dict[str, Any]] = []

    def clean_records() -> Iterator[dict[str, Any]]:
        for row in rows:
            number = row_name(row.number, rows.sources)
            if number in reasons:
                entry = {"number": number, "id": row.id, "reasons": reasons[number]}
                flagged.append({**entry, **(details or {}).get(number, {})})
            if keep_all or number not in reasons:
                yield row_record(row)

    write_jsonl(path, clean_records())
    titles = {problem.name: problem.title for problem in check.problems if problem.defect}
    written = check.usable - (0 if keep_all else len(flagged))
    counts = {"source": check.source, "written": written, "unusable": check.skipped, "reasons": titles}
    write_json(report_path(path), {**counts, "flagged" if keep_all else "left_out": flagged})
    return written


def row_record(row: Row) -> dict[str, Any]:
    """Return the row in a form in which it is read again: both sides as a chat, as Alpaca, or as prompt and completion."""
    record: dict[str, Any] = {"id": row.id} if row.id else {}
    for turn, suffix in zip(row.sides, ("", ENGLISH_SUFFIX), strict=True):
        if turn.history:
            query, answer = ("user", turn.user_text), ("assistant", turn.completion)
            last = [{"role": role, "content": text} for role, text in (query, answer)]
            record[f"messages{suffix}"] = [*turn.history, *last]
        elif turn.input:
            texts = {"instruction": turn.prompt, "input": turn.input, "output": turn.completion}
            record |= {f"{key}{suffix}": text for key, text in texts.items()}
        else:
            record |= {f"prompt{suffix}": turn.prompt, f"completion{suffix}": turn.completion}
    return record
