"""The whole check: every row alone, then all together, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

from pivotune.data.check.findings import Findings
from pivotune.data.check.language import base_language
from pivotune.data.check.lengths import CharacterMeter, TokenMeter
from pivotune.data.check.pairs import check_pairs
from pivotune.data.check.result import DataCheck, Shift
from pivotune.data.check.row_checks import TextCheck
from pivotune.data.examples import Encoder
from pivotune.data.rows import Row
from pivotune.data.sources import Rows
from pivotune.errors import UsageError

Progress = Callable[[int], None]
_ROWS_PER_STEP = 512


def check_rows(
    rows: Sequence[Row],
    *,
    language: str,
    encoder: Encoder | None = None,
    examples: int = 3,
    progress: Progress | None = None,
) -> DataCheck:
    """Check parallel rows.

    Args:
        rows: rows with all four texts, best as `load_rows(..., on_bad_row="skip")` gives them, which counts the others.
        language: code of the target language: `vi`, `zh-Hans`, `pt_BR`, `vie_Latn`...
        encoder: the tokenizer, template and limits that training will use; without it lengths are in characters.
        examples: flagged rows to keep for each kind of problem.
        progress: called with the number of rows done so far.

    Raises:
        UsageError: no rows, a row that lacks a text, or English as the target language.
    """
    if base_language(language) == "en":
        raise UsageError(
            f"language: {language} is English, which is the other side of every row; name the target language"
        )
    if not rows:
        raise UsageError("data check: there are no rows")
    found = Findings(examples)
    texts = TextCheck(language, found, len(rows))
    meter = TokenMeter(encoder, len(rows)) if encoder else CharacterMeter()
    iterator = iter(rows)
    while chunk := list(islice(iterator, _ROWS_PER_STEP)):
        _refuse_unusable(chunk)
        meter.add(chunk)
        for row in chunk:
            texts.add(row)
        if progress:
            progress(len(texts.numbers))
    texts.check_repeats()
    shifts = [_placed(shift, texts.numbers) for shift in check_pairs(rows, texts, found)]
    return _result(rows, language, meter, found, shifts, texts)


def _refuse_unusable(rows: Sequence[Row]) -> None:
    lacking = next((row for row in rows if not (row.has_target and row.has_english)), None)
    if lacking is not None:
        raise UsageError(f"data check: row {lacking.number} lacks a text; load the rows with on_bad_row='skip'")


def _result(
    rows: Sequence[Row],
    language: str,
    meter: CharacterMeter | TokenMeter,
    found: Findings,
    shifts: list[Shift],
    texts: TextCheck,
) -> DataCheck:
    read = rows if isinstance(rows, Rows) else Rows(rows, "the given rows", len(rows))
    check = DataCheck(
        source=read.source,
        language=language,
        total=read.total,
        usable=len(rows),
        skipped=dict(read.skipped),
        unit=meter.unit,
        measured=meter.measured,
        lengths=meter.lengths(),
        cut=meter.cut(),
        too_long=meter.too_long(),
        problems=found.problems(rows, texts.numbers),
        shifts=shifts,
        notes=texts.notes(),
        flagged=found.num_defects(len(rows)),
        verdict="",
    )
    return replace(check, verdict=_verdict(check))


def _verdict(check: DataCheck) -> str:
    parts = [f"{check.usable - check.flagged:,} of {check.total:,} rows look good"]
    if check.flagged:
        kinds = [f"{problem.name.replace('_', ' ')} {problem.count:,}" for problem in check.problems if problem.defect]
        parts.append(f"{check.flagged:,} with a defect ({', '.join(kinds)}): look at them and leave them out")
    if check.shifts:
        parts.append("realign the English side before training")
    if check.skipped:
        unusable = check.total - check.usable
        parts.append(f"{unusable:,} cannot be used: train with --set data.on_bad_row=skip")
    if check.too_long:
        left_out = sum(check.too_long.values())
        parts.append(f"{left_out:,} of {check.measured:,} do not fit this template or these limits")
    return "; ".join(parts)


def _placed(shift: Shift, numbers: Sequence[int]) -> Shift:
    return replace(shift, first=numbers[shift.first], last=numbers[shift.last])
