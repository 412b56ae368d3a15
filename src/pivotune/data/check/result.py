"""What a data check gives back: lengths, problems with their rows, and slipped stretches, as plain records."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pivotune.data.rows import Row


@dataclass(frozen=True, slots=True)
class Lengths:
    """Median, 95th percentile and maximum over the rows."""

    median: float
    p95: float
    max: int


@dataclass(frozen=True, slots=True)
class Finding:
    """One flagged row: its 1-based number in the source, why, and its texts."""

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
        name: for programs.
        title: for people.
        numbers: 1-based places of all rows that have it, in the source's order.
        defect: whether such rows should not be trained on; others are worth a look and often right.
        advice: what to do about it.
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
    """What `check_rows` found.

    Attributes:
        source: name of the data.
        language: the target language asked for, as given.
        total: rows read; `usable` of them have all four texts, `skipped` counts the others by reason.
        unit: of `lengths`: 'tokens' (prompts with their template, answers with their end token) or 'characters'.
        measured: how many rows `lengths`, `cut` and `too_long` are about: all, or those spread over the data that were
            tokenized.
        lengths: by text: prompt, completion, prompt_en, completion_en.
        cut: rows of which prompts or answers are cut at the token limits, and the limits; None without a tokenizer.
        too_long: rows that training would refuse because of the template or the limits, by reason.
        problems: what is wrong with rows, most serious first; kinds without rows are left out.
        shifts: stretches of rows whose English side has slipped.
        notes: what could not be checked, and doubts about the check itself.
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
        """Everything as plain values for JSON."""
        plain = {name: value for name, value in vars(self).items() if name not in ("lengths", "problems", "shifts")}
        return {
            **plain,
            "lengths": {name: asdict(lengths) for name, lengths in self.lengths.items()},
            "problems": [problem.to_dict() for problem in self.problems],
            "shifts": [{**asdict(shift), "message": str(shift)} for shift in self.shifts],
        }
