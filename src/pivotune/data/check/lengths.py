"""How long the texts are: in characters, or in tokens with what training would cut."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence

import numpy as np

from pivotune.data.check.result import Lengths
from pivotune.data.check.text import query_text, query_text_en
from pivotune.data.examples import Encoder, Pair
from pivotune.data.rows import Row

# Tokens are counted on this many rows at most, spread over the data: shares are then off by half a percentage point, and
# the tokenizer, by far the slowest part, takes seconds whatever the size of the file.
TOKENIZED_ROWS = 10_000
_TEXTS = ("prompt", "completion", "prompt_en", "completion_en")


class CharacterMeter:
    """Lengths in characters."""

    unit = "characters"

    def __init__(self) -> None:
        self._counts = {name: array("i") for name in _TEXTS}
        self.measured = 0

    def add(self, rows: Sequence[Row]) -> None:
        self.measured += len(rows)
        for row in rows:
            texts = (query_text(row), row.completion, query_text_en(row), row.completion_en)
            self._count([len(text) for text in texts])

    def _count(self, lengths: Sequence[int]) -> None:
        for name, length in zip(_TEXTS, lengths, strict=True):
            self._counts[name].append(length)

    def lengths(self) -> dict[str, Lengths]:
        return {name: _summary(counts) for name, counts in self._counts.items() if counts}

    def cut(self) -> dict[str, int] | None:
        return None

    def too_long(self) -> dict[str, int]:
        return {}


class TokenMeter(CharacterMeter):
    """Lengths in tokens, and what training would cut: rows go through a real encoder with the same limits."""

    unit = "tokens"

    def __init__(self, encoder: Encoder, num_rows: int) -> None:
        super().__init__()
        self._encoder = _MeasuringEncoder(encoder, self._count)
        self._step = math.ceil(num_rows / TOKENIZED_ROWS)
        self._seen = 0

    def add(self, rows: Sequence[Row]) -> None:
        chosen = rows[-self._seen % self._step :: self._step]
        self._seen += len(rows)
        self.measured += len(chosen)
        self._encoder.encode(chosen, on_bad_row="skip")

    def cut(self) -> dict[str, int]:
        report, limits = self._encoder.report, self._encoder.limits
        return {
            "prompts": report.cut["prompts"],
            "answers": report.cut["answers"],
            "max_prompt_tokens": limits.prompt,
            "max_completion_tokens": limits.completion,
        }

    def too_long(self) -> dict[str, int]:
        return dict(self._encoder.report.skipped)


class _MeasuringEncoder(Encoder):
    """Reports the lengths of every pair before it is cut."""

    def __init__(self, encoder: Encoder, report_lengths: Callable[[Sequence[int]], None]) -> None:
        super().__init__(encoder.tokenizer, encoder.template, encoder.limits)
        self._report_lengths = report_lengths

    def _fit(self, pair: Pair) -> Pair:
        sides = [side for side in (pair.target, pair.english) if side is not None]
        self._report_lengths([length for side in sides for length in (side.answer, side.num_answer_tokens)])
        return super()._fit(pair)


def _summary(counts: array) -> Lengths:
    median, p95 = np.percentile(counts, [50, 95])
    return Lengths(float(median), float(p95), max(counts))
