"""Checks of a row against all others: slipped, of an unusual length ratio, or no translation of its English."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from pivotune.data.check.findings import Findings
from pivotune.data.check.lexicon import Strange, stranger_pairs
from pivotune.data.check.result import Shift
from pivotune.data.check.row_checks import TextCheck
from pivotune.data.check.shifts import find_shifts
from pivotune.data.check.traces import RATIO_CHARACTERS, TraceTable, disagreements, row_trace
from pivotune.data.rows import Row

# Robust z-score of the log length ratio. Ratios have long tails: the usual 3.5 flags hundreds of good rows in 30,000.
RATIO_Z = 6.0
# And at least this factor away from the usual ratio, for files whose ratios hardly scatter.
RATIO_FACTOR = 2.5
# The spread is estimated among this many rows of similar length: ratios of short texts scatter more.
RATIO_ROWS = 500
# Signals of one row that must come together where no lexicon can be learned, or beside one that sees no fault.
SIGNALS_ALONE, SIGNALS_BESIDE_LEXICON = 2, 3


def check_pairs(rows: Sequence[Row], texts: TextCheck, found: Findings) -> list[Shift]:
    """Slipped stretches (given back, with 0-based places), length ratios and misaligned pairs."""
    shifts = find_shifts(texts.traces)
    for shift in shifts:
        for index in range(shift.first, shift.last + 1):
            english = texts.numbers[min(max(index + shift.by, 0), len(rows) - 1)]
            found.add("shifted", index, f"its English is rather that of row {english}", -index)
    outliers = _ratio_outliers(texts.traces)
    for index, factor in sorted(outliers.items()):
        found.add("length_ratio", index, f"target {factor:.2g} times as long as usual", abs(math.log(factor)))
    _check_alignment(rows, texts, found)
    return shifts


def _check_alignment(rows: Sequence[Row], texts: TextCheck, found: Findings) -> None:
    """Misaligned pairs: strangers by the lexicon, or several signals at once."""
    explained = found.flagged(("shifted", "untranslated", "wrong_language"), len(rows))
    strangers = stranger_pairs(texts, explained)
    needed = SIGNALS_ALONE if strangers is None else SIGNALS_BESIDE_LEXICON
    strange = strangers or {}
    unusual = found.flagged(["length_ratio"], len(rows))
    signals = np.frombuffer(texts.traces.signals, dtype=np.uint8) + unusual
    suspects = signals >= needed
    suspects[list(strange)] = True
    for index in np.flatnonzero(suspects & ~explained).tolist():
        excess = strange[index].excess if index in strange else 0
        note = partial(_why_misaligned, rows, index, strange.get(index), bool(unusual[index]))
        found.add("misaligned", index, note, int(signals[index]) + excess)


def _why_misaligned(rows: Sequence[Row], index: int, strange: Strange | None, unusual_length: bool) -> str:
    words = [f"words of the {strange.part} do not belong to the English ones"] if strange else []
    signals = [*disagreements(row_trace(rows[index])), *(["length ratio"] if unusual_length else [])]
    return "; ".join(words + signals)


def _ratio_outliers(traces: TraceTable) -> dict[int, float]:
    """Rows whose length ratio is far from that of rows of similar length: index -> ratio over the usual one."""
    target, english = np.log(traces.characters().sum(axis=2) + RATIO_CHARACTERS).T
    ratio, outliers = target - english, {}
    order = np.argsort(target + english, kind="stable")
    for part in np.array_split(order, max(1, len(order) // RATIO_ROWS)):
        distance = ratio[part] - np.median(ratio[part])
        # 1.4826 makes the median absolute deviation the standard deviation of a normal distribution.
        spread = 1.4826 * np.median(np.abs(distance))
        far = np.abs(distance) > max(RATIO_Z * spread, math.log(RATIO_FACTOR))
        outliers.update(zip(part[far].tolist(), np.exp(distance[far]).tolist(), strict=True))
    # Code is as long on both sides, whatever is usual for text.
    return {index: factor for index, factor in outliers.items() if not traces.is_code(index)}
