"""The kinds of problems, and the rows flagged with them while a check runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


class Findings:
    """Flagged rows by kind: index -> (note, how clear)."""

    def __init__(self) -> None:
        self.by_kind: dict[str, dict[int, tuple[str, float]]] = {name: {} for name in _KINDS}

    def add(self, kind: str, index: int, note: str, clearness: float = 0.0) -> None:
        """Flag a row (0-based); the first note of a kind stays."""
        self.by_kind[kind].setdefault(index, (note, clearness))

    def problems(self, rows: Sequence[Row], examples: int) -> list[Problem]:
        """All kinds that some row has, each with its clearest `examples`."""
        return [self._problem(name, flagged, rows, examples) for name, flagged in self.by_kind.items() if flagged]

    def defects(self) -> set[int]:
        """Rows (0-based) that should not be trained on."""
        return {index for name, flagged in self.by_kind.items() if _KINDS[name].defect for index in flagged}

    @staticmethod
    def _problem(name: str, flagged: dict[int, tuple[str, float]], rows: Sequence[Row], examples: int) -> Problem:
        indices = sorted(flagged)
        clearest = sorted(indices, key=lambda index: -flagged[index][1])[:examples]
        shown = [Finding(rows[index].number, flagged[index][0], rows[index]) for index in clearest]
        return Problem(
            name=name, numbers=[rows[index].number for index in indices], examples=shown, **_KINDS[name]._asdict()
        )
