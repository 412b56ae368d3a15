"""The result of a data check as plain records, and the flagged rows that are collected while it runs."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pivotune.data.rows import Row


@dataclass(frozen=True, slots=True)
class Lengths:
    """Median, 95th percentile and maximum over the rows."""

    median: float
    p95: float
    max: int


@dataclass(frozen=True, slots=True)
class Finding:
    """One flagged row: its 1-based number in the source, the reason, and its texts."""

    number: int
    note: str
    row: Row = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        texts = {name: getattr(self.row, name) for name in ("prompt", "completion", "prompt_en", "completion_en")}
        return {"number": self.number, "id": self.row.id, "note": self.note, **texts}


@dataclass(frozen=True, slots=True)
class Problem:
    """One kind of problem.

    Attributes:
        name, title: the kind, for programs and for people.
        numbers: 1-based places of all rows of this kind, in the source's order.
        defect: True if such rows should not be trained on; other kinds are worth a look and often right.
        advice: how to repair such rows.
        examples: some of the rows, the clearest first.
    """

    name: str
    title: str
    numbers: list[int]
    defect: bool
    advice: str
    examples: list[Finding]

    @property
    def count(self) -> int:
        return len(self.numbers)

    def to_dict(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("name", "title", "count", "defect", "advice", "numbers")}
        return {**plain, "examples": [finding.to_dict() for finding in self.examples]}


@dataclass(frozen=True, slots=True)
class Shift:
    """Rows `first` to `last` (1-based places) whose English stands `by` rows further down (negative: up)."""

    first: int
    last: int
    by: int
    rows: int

    def __str__(self) -> str:
        distance = "one row" if abs(self.by) == 1 else f"{abs(self.by)} rows"
        direction = "further down" if self.by > 0 else "further up"
        return (
            f"the English side looks shifted by {distance} from row {self.first} to row {self.last}: "
            f"the English of these rows stands {distance} {direction}"
        )


@dataclass(frozen=True)
class DataCheck:
    """The result of `check_rows`.

    Attributes:
        source: name of the data.
        language: the target language asked for, as given.
        total: rows read; `usable` of them have all four texts, `skipped` counts the others by reason.
        unit: of `lengths`: 'tokens' (prompts with their template, answers with their end token) or 'characters'.
        measured: number of rows behind `lengths`, `cut` and `too_long`: all, or the tokenized ones, spread over the data.
        lengths: by text: prompt, completion, prompt_en, completion_en.
        cut: number of prompts and of answers that the token limits cut, and the limits; None without a tokenizer.
        too_long: rows that training would refuse because of the template or the limits, by reason.
        problems: the kinds that some row has, most serious first.
        shifts: stretches of rows whose English side has slipped.
        notes: checks that were not possible, and doubts about the check itself.
        flagged: rows with at least one defect.
        verdict: one line.
    """

    source: str
    language: str
    total: int
    usable: int
    skipped: dict[str, int]
    unit: str
    measured: int
    lengths: dict[str, Lengths]
    cut: dict[str, int] | None
    too_long: dict[str, int]
    problems: list[Problem]
    shifts: list[Shift]
    notes: list[str]
    flagged: int
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        plain = {name: value for name, value in vars(self).items() if name not in ("lengths", "problems", "shifts")}
        return {
            **plain,
            "lengths": {name: asdict(lengths) for name, lengths in self.lengths.items()},
            "problems": [problem.to_dict() for problem in self.problems],
            "shifts": [{**asdict(shift), "message": str(shift)} for shift in self.shifts],
        }


class _Kind(NamedTuple):
    title: str
    defect: bool
    advice: str


_LOOK = "look at them; leave them out if they do not translate each other"
_TRANSLATE = "translate them or leave them out"
_KINDS = {
    "shifted": _Kind("English side shifted", True, "insert or remove the row where the shift begins"),
    "misaligned": _Kind("likely misaligned pair", True, _LOOK),
    "untranslated": _Kind("not translated: the prompt is the English one", True, _TRANSLATE),
    "wrong_language": _Kind("another language than asked for", True, _TRANSLATE),
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

# The reason for flagging a row; a function is called only for the rows that are shown.
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
        """Return True if this row was flagged last among those of the kind."""
        places = self._places[kind]
        return bool(places) and places[-1] == index

    def flagged(self, kinds: Sequence[str], num_rows: int) -> np.ndarray:
        """Return the rows that are flagged with any of these kinds, bool (rows,)."""
        mask = np.zeros(num_rows, dtype=bool)
        for kind in kinds:
            mask[np.array(self._places[kind], dtype=np.int64)] = True
        return mask

    def num_defects(self, num_rows: int) -> int:
        """Return the number of rows that should not be trained on."""
        return int(self.flagged([name for name, kind in _KINDS.items() if kind.defect], num_rows).sum())

    def problems(self, rows: Sequence[Row], numbers: Sequence[int]) -> list[Problem]:
        """Return all kinds that some row has, with their clearest rows; `numbers` are the rows' places in their source."""
        return [
            Problem(
                name=name,
                numbers=[numbers[place] for place in places],
                examples=[
                    Finding(numbers[-place], note if isinstance(note, str) else note(), rows[-place])
                    for _, place, note in sorted(self._clearest[name], key=lambda entry: (-entry[0], -entry[1]))
                ],
                **_KINDS[name]._asdict(),
            )
            for name, places in self._places.items()
            if places
        ]
