"""The result of a data check as plain records, and the flagged rows that are collected while it runs."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict

import numpy as np

from pivotune.data.rows import Row
from pivotune.text.words import counted


@dataclass(frozen=True, slots=True)
class Lengths:
    """Median, 95th percentile and maximum over the rows."""

    median: float
    p95: float
    max: int


class Histogram(TypedDict):
    """Numbers of rows between neighbouring edges, which grow by a constant factor."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True, slots=True)
class Finding:
    """One flagged row: its 1-based number in the source, with several sources as `b.jsonl:3`, the reason, and its texts."""

    number: int | str
    note: str
    row: Row = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        texts = {name: getattr(self.row, name) for name in TEXTS}
        return {"number": self.number, "id": self.row.id, "note": self.note, **texts}


@dataclass(frozen=True, slots=True)
class Problem:
    """One kind of problem.

    Attributes:
        name, title: the kind, for programs and for people.
        numbers: 1-based places of all rows of this kind, in the source's order; with several sources as `b.jsonl:3`.
        defect: True if such rows should not be trained on; other kinds are worth a look and often right.
        advice: how to repair such rows.
        examples: some of the rows, the clearest first.
    """

    name: str
    title: str
    numbers: list[int | str]
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
    """Rows `first` to `last` (as in `Problem.numbers`) whose English stands `by` rows further down (negative: up)."""

    first: int | str
    last: int | str
    by: int
    rows: int

    def __str__(self) -> str:
        distance, way = counted(abs(self.by)), "down" if self.by > 0 else "up"
        place = f"from row {self.first} to row {self.last}: the English of these rows stands {distance} further {way}"
        return f"the English side looks shifted by {distance} {place}"


@dataclass(frozen=True)
class DataCheck:
    """The result of `check_rows`.

    Attributes:
        total: rows read; `usable` of them have all four texts, `skipped` counts the others by reason, and
            `skipped_at` names the first place of each reason.
        unit: of `lengths`: 'tokens' (prompts with their template, answers with their end token) or 'characters'.
        measured: number of rows behind `lengths`, `cut` and `too_long`: all, or the tokenized ones, spread over the data.
        lengths: by text: prompt, completion, prompt_en, completion_en.
        histograms: of all rows, in characters: `lengths` by text, and `ratios` of a text to its English by text.
        cut: number of prompts and of answers that the token limits cut, and the limits; None without a tokenizer.
        too_long: rows that training would refuse because of the template or the limits, by reason.
        problems: the kinds that some row has, most serious first; `flagged` rows have at least one defect.
        notes: checks that were not possible, and doubts about the check itself.
    """

    source: str
    language: str
    total: int
    usable: int
    skipped: dict[str, int]
    skipped_at: dict[str, str]
    unit: str
    measured: int
    lengths: dict[str, Lengths]
    histograms: dict[str, dict[str, Histogram]]
    cut: dict[str, int] | None
    too_long: dict[str, int]
    problems: list[Problem]
    shifts: list[Shift]
    notes: list[str]
    flagged: int

    @property
    def verdict(self) -> str:
        """One line."""
        parts = [f"{self.usable - self.flagged:,} of {self.total:,} rows look good"]
        if self.flagged:
            defects = [problem for problem in self.problems if problem.defect]
            kinds = ", ".join(f"{problem.name.replace('_', ' ')} {problem.count:,}" for problem in defects)
            parts.append(f"{self.flagged:,} with a defect ({kinds}): look at them; mend them or leave them out")
        if self.shifts:
            parts.append("realign the English side before training")
        if self.skipped:
            parts.append(f"{self.total - self.usable:,} cannot be used: train with --set data.on_bad_row=skip")
        if left_out := sum(self.too_long.values()):
            parts.append(f"{left_out:,} of {self.measured:,} do not fit this template or these limits")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        plain = {name: value for name, value in vars(self).items() if name not in ("lengths", "problems", "shifts")}
        return {
            **plain,
            "verdict": self.verdict,
            "lengths": {name: asdict(lengths) for name, lengths in self.lengths.items()},
            "problems": [problem.to_dict() for problem in self.problems],
            "shifts": [{**asdict(shift), "message": str(shift)} for shift in self.shifts],
        }


# Of a row, in the order of training.
TEXTS = ("prompt", "completion", "prompt_en", "completion_en")
_LOOK = "look at them; leave them out if they do not translate each other"
_TRANSLATE = "translate them or leave them out"
# Title, defect and advice of each kind, most serious first.
_KINDS = {
    "shifted": ("English side shifted", True, "insert or remove the row where the shift begins"),
    "misaligned": ("likely misaligned pair", True, _LOOK),
    "untranslated": ("not translated: the prompt is the English one", True, _TRANSLATE),
    "wrong_language": ("another language than asked for", True, _TRANSLATE),
    "english_not_english": ("the English side is not English", True, "check for swapped columns"),
    "duplicate_rows": ("exact duplicate of an earlier row", True, "leave them out: they may end up in both splits"),
    "left_in_english": ("answer, or part of it, left in English", True, _TRANSLATE),
    "cut_answer": ("answer cut short", True, "translate the whole answer, with a higher limit of new tokens"),
    "lost_number": ("a number of the English side is missing", True, "correct the number, or translate again"),
    "wrong_encoding": ("characters of a wrong encoding", True, "read the source again with its own encoding"),
    "html_tags": ("HTML tags on one side", True, "remove the tags before translating"),
    "html_escapes": ("HTML escapes", True, "unescape them (&lt; &quot; &#39;)"),
    "control_tokens": ("control tokens of a model as text", True, "remove them; training reads them as plain text"),
    "placeholder": ("placeholder in place of a text", True, "leave the field out, or translate again"),
    "literal_escapes": ("escapes that were not undone", True, "decode them (\\n, \\u00e9, %C3%A9)"),
    "invisible_characters": ("invisible or control characters", True, "remove them"),
    "decomposed_characters": ("letters and accents apart (NFD)", True, "normalize the file to NFC"),
    "compatibility_characters": ("letters in compatibility forms", True, "normalize these texts to NFKC"),
    "repeated_text": ("repeated text", True, "translate again: models that are stuck repeat themselves"),
    "spacing": ("lost or added spaces or line breaks", True, "undo the tokenization, or translate again"),
    "placeholder_in_english": ("placeholder on the English side only", False, "remove it from the English text"),
    "length_ratio": ("unusual length ratio to English", False, "look for padded translations"),
    "same_prompt": ("prompt of an earlier row, other answer", False, "fine if several answers are right"),
    "duplicate_english": ("English of an earlier row, other translation", False, "fine if meant"),
}

DEFECTS = tuple(name for name, (_, defect, _) in _KINDS.items() if defect)

# The reason for flagging a row; a function is called only for the rows that are shown.
Note = str | Callable[[], str]


class Findings:
    """Flagged rows by kind: the places of all (8 bytes each), and the notes of the `examples` clearest or first ones."""

    def __init__(self, examples: int) -> None:
        self._examples = examples
        self._places = {name: array("q") for name in _KINDS}
        self._clearest: dict[str, list[tuple[float, int, Note]]] = {name: [] for name in _KINDS}

    def add(self, kind: str, index: int, note: Note, clearness: float = 0.0) -> None:
        """Flag a row (0-based). Rows of a kind come in their order; the first note on a row stays."""
        places, clearest = self._places[kind], self._clearest[kind]
        if places and places[-1] == index:
            return
        places.append(index)
        heapq.heappush(clearest, (clearness, -index, note))
        if len(clearest) > self._examples:
            heapq.heappop(clearest)

    def flagged(self, kinds: Sequence[str], num_rows: int) -> np.ndarray:
        """Return the rows that are flagged with any of these kinds, bool (rows,)."""
        mask = np.zeros(num_rows, dtype=bool)
        for kind in kinds:
            mask[np.array(self._places[kind], dtype=np.int64)] = True
        return mask

    def problems(self, rows: Sequence[Row], name: Callable[[int], int | str]) -> list[Problem]:
        """Return all kinds that some row has, with their clearest rows; `name` gives the number of a row in its source."""
        problems = []
        for kind, (title, defect, advice) in _KINDS.items():
            clearest = sorted(self._clearest[kind], key=lambda entry: (-entry[0], -entry[1]))
            examples = [
                Finding(name(-place), note if isinstance(note, str) else note(), rows[-place])
                for _, place, note in clearest
            ]
            if places := self._places[kind]:
                problems.append(Problem(kind, title, [name(place) for place in places], defect, advice, examples))
        return problems
