"""The whole check: every row alone, then all together, the lengths and the verdict."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from pivotune.data.check.language import base_language, side_texts
from pivotune.data.check.pairs import check_pairs
from pivotune.data.check.result import DataCheck, Findings, Lengths
from pivotune.data.check.rows import RowCheck
from pivotune.data.examples import Encoder, Pair
from pivotune.data.rows import Row
from pivotune.data.sources import Rows
from pivotune.errors import UsageError

# Tokens are counted on this many rows at most, spread over the data: shares are then off by half a percentage point, and
# the tokenizer, by far the slowest part, takes seconds for a file of any size.
TOKENIZED_ROWS = 10_000
_ROWS_PER_STEP = 512


def check_rows(
    rows: Sequence[Row],
    *,
    language: str,
    encoder: Encoder | None = None,
    examples: int = 3,
    progress: Callable[[int], None] | None = None,
) -> DataCheck:
    """Check parallel rows.

    Args:
        rows: rows with all four texts, best from `load_rows(..., on_bad_row="skip")`, which counts the others.
        language: code of the target language: `vi`, `zh-Hans`, `pt_BR`, `vie_Latn`...
        encoder: the tokenizer, template and limits of the training to come; without it lengths are in characters.
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
    checked = RowCheck(language, found, len(rows))
    meter = _Meter(encoder, len(rows))
    iterator = iter(rows)
    while chunk := list(islice(iterator, _ROWS_PER_STEP)):
        for row in chunk:
            if not (row.has_target and row.has_english):
                raise UsageError(f"data check: row {row.number} lacks a text; load the rows with on_bad_row='skip'")
            checked.add(row)
        meter.add(chunk)
        if progress:
            progress(len(checked.numbers))
    checked.check_repeats()
    numbers = checked.numbers
    shifts = [
        replace(shift, first=numbers[shift.first], last=numbers[shift.last])
        for shift in check_pairs(rows, checked, found)
    ]
    read = rows if isinstance(rows, Rows) else Rows(rows, "the given rows", len(rows))
    check = DataCheck(
        source=read.source,
        language=language,
        total=read.total,
        usable=len(rows),
        skipped=dict(read.skipped),
        unit="tokens" if encoder else "characters",
        measured=meter.measured,
        lengths=meter.lengths(),
        cut=meter.cut(),
        too_long=meter.too_long(),
        problems=found.problems(rows, numbers),
        shifts=shifts,
        notes=checked.notes(),
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


class _Meter:
    """Lengths of the texts: in characters, or in tokens through an encoder with the limits of training."""

    def __init__(self, encoder: Encoder | None, num_rows: int) -> None:
        self._counts = {name: array("i") for name in ("prompt", "completion", "prompt_en", "completion_en")}
        self._encoder = _MeasuringEncoder(encoder, self._count) if encoder else None
        self._step = math.ceil(num_rows / TOKENIZED_ROWS) if encoder else 1
        self._seen = self.measured = 0

    def add(self, rows: Sequence[Row]) -> None:
        chosen = rows[-self._seen % self._step :: self._step]
        self._seen += len(rows)
        self.measured += len(chosen)
        if self._encoder:
            self._encoder.encode(chosen, on_bad_row="skip")
            return
        for row in chosen:
            self._count([len(text.text) for side in side_texts(row) for text in side])

    def _count(self, lengths: Sequence[int]) -> None:
        for counts, length in zip(self._counts.values(), lengths, strict=True):
            counts.append(length)

    def lengths(self) -> dict[str, Lengths]:
        measured = {name: counts for name, counts in self._counts.items() if counts}
        return {
            name: Lengths(*map(float, np.percentile(counts, [50, 95])), max=max(counts))
            for name, counts in measured.items()
        }

    def cut(self) -> dict[str, int] | None:
        if not self._encoder:
            return None
        report, limits = self._encoder.report, self._encoder.limits
        return {
            "prompts": report.cut["prompts"],
            "answers": report.cut["answers"],
            "max_prompt_tokens": limits.prompt,
            "max_completion_tokens": limits.completion,
        }

    def too_long(self) -> dict[str, int]:
        return dict(self._encoder.report.skipped) if self._encoder else {}


class _MeasuringEncoder(Encoder):
    """Reports the lengths of every pair before it is cut."""

    def __init__(self, encoder: Encoder, report_lengths: Callable[[Sequence[int]], None]) -> None:
        super().__init__(encoder.tokenizer, encoder.template, encoder.limits)
        self._report_lengths = report_lengths

    def _fit(self, pair: Pair) -> Pair:
        sides = [side for side in (pair.target, pair.english) if side is not None]
        self._report_lengths([length for side in sides for length in (side.answer, side.num_answer_tokens)])
        return super()._fit(pair)
