"""The kinds of problems, and the rows flagged with them while a check runs."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pivotune.data.check.result import Finding, Problem
from pivotune.data.rows import Row


class _Kind(NamedTuple):
    title: str
    defect: bool
    advice: str


_KINDS = {
    "shifted": _Kind("English side shifted", True, "insert or remove the row where the shift begins"),
    "misaligned": _Kind(
        "likely misaligned pair", True, "look at them; leave them out if they do not translate each other"
    ),
    "untranslated": _Kind("not translated: the prompt is the English one", True, "translate them or leave them out"),
    "wrong_language": _Kind("another language than asked for", True, "translate them or leave them out"),
    "english_not_english": _Kind("the English side is not English", True, "check for swapped columns"),
    "duplicate_rows": _Kind(
        "exact duplicate of an earlier row", True, "leave them out: they may end up in both splits"
    ),
    "copied_answer": _Kind("answer copied from English", False, "right where the task asks for English text"),
    "length_ratio": _Kind("unusual length ratio to English", False, "look for cut or padded translations"),
    "html_escapes": _Kind("HTML escapes that English does not have", False, "unescape them (&lt; &quot; &#39;)"),
    "same_prompt": _Kind("prompt of an earlier row, other answer", False, "fine if several answers are right"),
    "duplicate_english": _Kind("English of an earlier row, other translation", False, "fine if meant"),
}


# Why a row is flagged; called only for the rows that are shown.
Note = str | Callable[[], str]


class Findings:
    """Flagged rows by kind: the places of all of them (8 bytes each), and the notes of the clearest ones.

    Args:
        examples: rows to keep for each kind; of equally clear ones the first.
    """

    def __init__(self, examples: int) -> None:
        self._examples = examples
        self._places = {name: array("q") for name in _KINDS}
        self._clearest: dict[str, list[tuple[float, int, Note]]] = {name: [] for name in _KINDS}

    def add(self, kind: str, index: int, note: Note, clearness: float = 0.0) -> None:
        """Flag a row (0-based). Rows of a kind come in their order; the first note on a row stays."""
        if self.is_last(kind, index):
            return
        self._places[kind].append(index)
        heapq.heappush(self._clearest[kind], (clearness, -index, note))
        if len(self._clearest[kind]) > self._examples:
            heapq.heappop(self._clearest[kind])

    def is_last(self, kind: str, index: int) -> bool:
        """Whether this row was flagged last among those of the kind."""
        places = self._places[kind]
        return bool(places) and places[-1] == index

    def flagged(self, kinds: Sequence[str], num_rows: int) -> np.ndarray:
        """Which rows are flagged with any of these kinds, bool (rows,)."""
        mask = np.zeros(num_rows, dtype=bool)
        for kind in kinds:
            mask[np.array(self._places[kind], dtype=np.int64)] = True
        return mask

    def num_defects(self, num_rows: int) -> int:
        """How many rows should not be trained on."""
        return int(self.flagged([name for name, kind in _KINDS.items() if kind.defect], num_rows).sum())

    def problems(self, rows: Sequence[Row], numbers: Sequence[int]) -> list[Problem]:
        """All kinds that some row has, each with its clearest rows; `numbers` are those of the rows in their source."""
        return [self._problem(name, rows, numbers) for name, places in self._places.items() if places]

    def _problem(self, name: str, rows: Sequence[Row], numbers: Sequence[int]) -> Problem:
        shown = [
            Finding(numbers[-place], note if isinstance(note, str) else note(), rows[-place])
            for _, place, note in sorted(self._clearest[name], key=lambda entry: (-entry[0], -entry[1]))
        ]
        found = [numbers[place] for place in self._places[name]]
        return Problem(name=name, numbers=found, examples=shown, **_KINDS[name]._asdict())
