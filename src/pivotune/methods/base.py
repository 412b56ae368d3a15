"""A method decides which rows are trained in which language. Nothing else compares method names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pivotune.errors import UsageError
from pivotune.text.languages import find_language

Language = Literal["target", "english"]


@dataclass(frozen=True, kw_only=True)
class ExamplePlan:
    """One entry for each training example, in order.

    Attributes:
        rows: places of the rows, int64 (examples,).
        english_prompt, english_answer: whether prompt and answer are the English ones, bool (examples,).
        parallel: whether the example carries the row's English side for the inner losses, bool (examples,).
    """

    rows: np.ndarray
    english_prompt: np.ndarray
    english_answer: np.ndarray
    parallel: np.ndarray


@dataclass(frozen=True, kw_only=True)
class RequiredSides:
    """The sides that every row must have, and the setting that needs them, for messages."""

    target: bool
    english: bool
    needed_by: str


@dataclass(frozen=True, kw_only=True)
class Method:
    """Fine-tuning on parallel rows; registered in `pivotune.config.registry.METHODS`. Subclasses rewrite the rows.

    Attributes:
        name: value of `method` in YAML.
        summary: one sentence for the model card.
        main_language: the language that the method teaches; the held-out rows must have this side.
        replay: whether `data.english_ratio` turns a share of the rows into English ones.
        inner_losses: whether `supervision` applies.
        needs_english: whether every training row must have its English side.
        pivot_marker: the text between the English part of an answer and the target's part, with `{language}` for the
            target's name; None where answers have one part. Held-out rows are rewritten too, and evaluation generates the
            English part before it asks for the answer.
    """

    name: str
    summary: str
    main_language: Language
    replay: bool
    inner_losses: bool = False
    needs_english: bool = False
    pivot_marker: str | None = None

    def rewriter(self, rows: Sequence[Any], settings: Any) -> Callable[[int, Any], Any] | None:
        """Return a function from a row's place and the row to the row that is trained; None for the rows as they are.

        Args:
            rows: all rows to train on (`pivotune.data.rows.Row`).
            settings: the run's configuration, or the trainer's arguments.
        """
        return None

    def plan(self, replayed: np.ndarray) -> ExamplePlan:
        """Return the training examples: one a row, in the main language, or in English where `replayed` (rows,) is True."""
        english = replayed | (self.main_language == "english")
        return ExamplePlan(
            rows=np.arange(len(replayed)),
            english_prompt=english,
            english_answer=english,
            parallel=np.full(len(replayed), self.inner_losses) & ~english,
        )


def check_named(codes: Sequence[str], what: str) -> None:
    """Refuse texts that name their language, where it is not set or has no known name; `what` begins the message."""
    if not codes:
        raise UsageError(f"{what} name the language; set data.language")
    for code in codes:
        find_language(code)


def marker_in(pivot_marker: str | None, language: str) -> str:
    """Return a method's `pivot_marker` with the name of a language; '' where answers have one part."""
    return "" if pivot_marker is None else pivot_marker.format(language=find_language(language).name)


def required_sides(method: Method, english_ratio: float, *, heldout: bool = False) -> RequiredSides:
    """Return the sides that rows need: for held-out rows the main language, and English where answers begin with it."""
    replay = f"data.english_ratio {english_ratio:g} (0 for none)"
    trained = method.needs_english or (method.replay and english_ratio > 0)
    return RequiredSides(
        target=method.main_language == "target",
        english=method.main_language == "english" or (trained and (not heldout or method.pivot_marker is not None)),
        needed_by=f"method {method.name}" if method.needs_english else replay,
    )
