"""The whole check: every row alone, then all together, the lengths and the verdict."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pivotune.data.check.language import base_language
from pivotune.data.check.result import DEFECTS, TEXTS, DataCheck, Findings, Histogram, Lengths
from pivotune.data.check.rows import RowCheck, check_pairs
from pivotune.data.examples import Encoder, Pair
from pivotune.data.lazy import Subset
from pivotune.data.rows import Row
from pivotune.data.sources import Rows
from pivotune.errors import UsageError

# Tokens are counted on this many rows at most, spread over the data: shares are then off by half a percentage point, and
# the tokenizer, by far the slowest part, takes seconds for a file of any size.
TOKENIZED_ROWS = 10_000
_BINS = 30
_ROWS_PER_STEP = 512  # between two calls of `progress`


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
    read = rows if isinstance(rows, Rows) else Rows(rows, {"the given rows": 0}, len(rows))
    found = Findings(examples)
    checked = RowCheck(language, found, len(rows), read.sources)
    for done, row in enumerate(rows, start=1):
        if not all(turn.is_whole for turn in row.sides):
            raise UsageError(f"data check: row {row.number} lacks a text; load the rows with on_bad_row='skip'")
        checked.add(row)
        if progress and (done % _ROWS_PER_STEP == 0 or done == len(rows)):
            progress(done)
    checked.check_repeats()
    shifts = check_pairs(rows, checked, found)
    return DataCheck(
        source=read.source,
        language=language,
        total=read.total,
        usable=len(rows),
        skipped=dict(read.skipped),
        problems=found.problems(rows, checked.name),
        shifts=shifts,
        notes=[*checked.notes(), *read.notes],
        flagged=int(found.flagged(DEFECTS, len(rows)).sum()),
        **_measure(rows, checked, encoder),
    )


def _measure(rows: Sequence[Row], checked: RowCheck, encoder: Encoder | None) -> dict[str, Any]:
    """Return `unit`, `measured`, `lengths`, `histograms`, `cut` and `too_long` of the `DataCheck`."""
    lengths, tokenized, cut, too_long = checked.traces.characters(), rows, None, {}
    if encoder:
        tokenized = Subset(rows, np.arange(0, len(rows), math.ceil(len(rows) / TOKENIZED_ROWS)))
        meter = _MeasuringEncoder(encoder.tokenizer, encoder.template, encoder.limits, fold_system=encoder.fold_system)
        for _ in meter.encode_lazily(tokenized, on_bad_row="skip"):
            pass
        lengths, too_long = np.frombuffer(meter.lengths, dtype=np.int32), dict(meter.report.skipped)
        limits = {"max_prompt_tokens": meter.limits.prompt, "max_completion_tokens": meter.limits.completion}
        cut = {"prompts": meter.report.cut["prompts"], "answers": meter.report.cut["answers"], **limits}
    by_text = {
        name: Lengths(*map(float, np.percentile(counts, [50, 95])), max=int(counts.max()))
        for name, counts in zip(TEXTS, lengths.reshape(-1, 4).T, strict=True)
        if len(counts)
    }
    unit = "tokens" if encoder else "characters"
    histograms = _histograms(checked.traces.characters().reshape(-1, 4))
    found = {"unit": unit, "measured": len(tokenized), "lengths": by_text, "histograms": histograms}
    return {**found, "cut": cut, "too_long": too_long}


def _histograms(characters: np.ndarray) -> dict[str, dict[str, Histogram]]:
    """Return the lengths of each text, (rows, 4), and the ratios of prompts and answers to their English."""
    lengths = np.maximum(characters, 1)
    ratios = lengths[:, :2] / lengths[:, 2:]

    def by_text(values: np.ndarray) -> dict[str, Histogram]:
        # Beyond the largest, so that a single length has a bin too.
        edges = np.geomspace(values.min(), values.max() * 1.01, _BINS + 1)
        columns = zip(TEXTS, values.T, strict=False)
        counts = {name: np.histogram(column, edges)[0].tolist() for name, column in columns}
        return {name: {"edges": edges.round(3).tolist(), "counts": found} for name, found in counts.items()}

    return {"lengths": by_text(lengths), "ratios": by_text(ratios)}


class _MeasuringEncoder(Encoder):
    """Collects the lengths of every pair's four texts before it is cut."""

    def __init__(self, *settings: Any, fold_system: bool) -> None:
        super().__init__(*settings, fold_system=fold_system)
        self.lengths = array("i")

    def _fit(self, pair: Pair) -> Pair:
        for side in (pair.target, pair.english):
            if side is not None:
                self.lengths.extend((side.answer, side.num_answer_tokens))
        return super()._fit(pair)
