"""Checks of a row against all others: slipped, of an unusual length ratio, or no translation of its English."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from pivotune.data.check.findings import Findings
from pivotune.data.check.lexicon import stranger_pairs
from pivotune.data.check.result import Shift
from pivotune.data.check.row_checks import TextCheck
from pivotune.data.check.shifts import find_shifts
from pivotune.data.check.traces import RATIO_CHARACTERS, Trace
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
            english = rows[min(max(index + shift.by, 0), len(rows) - 1)]
            found.add("shifted", index, f"its English is rather that of row {english.number}", -index)
    outliers = _ratio_outliers(texts.traces)
    for index, factor in outliers.items():
        found.add("length_ratio", index, f"target {factor:.2g} times as long as usual", abs(math.log(factor)))
    _check_alignment(texts, found)
    return shifts


def _check_alignment(texts: TextCheck, found: Findings) -> None:
    """Misaligned pairs: strangers by the lexicon, or several signals at once."""
    explained = set().union(*(found.by_kind[kind] for kind in ("shifted", "untranslated", "wrong_language")))
    strangers = stranger_pairs(texts, explained)
    needed = SIGNALS_ALONE if strangers is None else SIGNALS_BESIDE_LEXICON
    for index, trace in enumerate(texts.traces):
        if index in explained:
            continue
        signals = [*_disagreements(trace), *(["length ratio"] if index in found.by_kind["length_ratio"] else [])]
        strange = (strangers or {}).get(index)
        words = [f"words of the {strange.part} do not belong to the English ones"] if strange else []
        if strange or len(signals) >= needed:
            found.add(
                "misaligned", index, "; ".join(words + signals), len(signals) + (strange.excess if strange else 0)
            )


def _disagreements(trace: Trace) -> Iterator[str]:
    """Signals that two texts are no translation of each other; each alone is common in good rows."""
    target, english = trace
    if target.numbers and english.numbers and target.numbers.isdisjoint(english.numbers):
        yield f"numbers {_few(target.numbers)} against {_few(english.numbers)}"
    if target.fixed and english.fixed and target.fixed.isdisjoint(english.fixed):
        yield "other links or code"
    few, many = sorted((target.items, english.items))
    if few == 0 and many >= 3:
        yield f"{target.items} list items against {english.items}"
    if target.question != english.question:
        yield "question against statement"


def _few(numbers: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(numbers)[:3]))


def _ratio_outliers(traces: Sequence[Trace]) -> dict[int, float]:
    """Rows whose length ratio is far from that of rows of similar length: index -> ratio over the usual one."""
    target = np.log([trace.target.prompt + trace.target.answer + RATIO_CHARACTERS for trace in traces])
    english = np.log([trace.english.prompt + trace.english.answer + RATIO_CHARACTERS for trace in traces])
    ratio, outliers = target - english, {}
    order = np.argsort(target + english, kind="stable")
    for part in np.array_split(order, max(1, len(order) // RATIO_ROWS)):
        distance = ratio[part] - np.median(ratio[part])
        # 1.4826 makes the median absolute deviation the standard deviation of a normal distribution.
        spread = 1.4826 * np.median(np.abs(distance))
        far = np.abs(distance) > max(RATIO_Z * spread, math.log(RATIO_FACTOR))
        outliers.update(zip(part[far].tolist(), np.exp(distance[far]).tolist(), strict=True))
    # Code is as long on both sides, whatever is usual for text.
    return {index: factor for index, factor in outliers.items() if not any(side.is_code for side in traces[index])}
