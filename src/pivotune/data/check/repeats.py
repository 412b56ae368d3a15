"""Rows, prompts and English sides that stand in the data more than once."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from pivotune.data.check.findings import Findings
from pivotune.data.rows import Row


class Repeats:
    """Finds repetitions by 64-bit hashes: 24 bytes a row, whatever its texts."""

    def __init__(self) -> None:
        self._prompts, self._rows, self._english = array("q"), array("q"), array("q")

    def append(self, row: Row) -> None:
        """Add the next row."""
        history = str(row.history) if row.history else ""
        prompt = hash((row.prompt, row.input, history))
        self._prompts.append(prompt)
        self._rows.append(hash((prompt, row.completion)))
        self._english.append(hash((row.prompt_en, row.input_en, row.completion_en, str(row.history_en))))

    def flag(self, found: Findings, numbers: Sequence[int]) -> None:
        """Flag exact duplicates; among the others, earlier prompts with another answer and earlier English sides."""
        rows, prompts, english = map(_first_places, (self._rows, self._prompts, self._english))
        is_repeated = rows >= 0
        for kind, first, title in (
            ("duplicate_rows", rows, "same as"),
            ("same_prompt", np.where(is_repeated, -1, prompts), "prompt of"),
            ("duplicate_english", np.where(is_repeated, -1, english), "English of"),
        ):
            for index in np.flatnonzero(first >= 0).tolist():
                found.add(kind, index, f"{title} row {numbers[int(first[index])]}")


def _first_places(hashes: array) -> np.ndarray:
    """For each row the first place that has the same hash, -1 where that is its own; int64 (rows,)."""
    values = np.frombuffer(hashes, dtype=np.int64)
    order = np.argsort(values, kind="stable")
    is_new = np.ones(len(values), dtype=bool)
    is_new[1:] = values[order[1:]] != values[order[:-1]]
    first = np.full(len(values), -1)
    first[order] = np.where(is_new, -1, order[is_new][np.cumsum(is_new) - 1])
    return first
