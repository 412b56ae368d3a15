"""A method decides which rows are trained in which language. Nothing else compares method names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

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


class Method(Protocol):
    """A way to train on parallel rows; registered in `pivotune.config.registry.METHODS`.

    Attributes:
        name: value of `method` in YAML.
        summary: one sentence for the model card.
        main_language: the language that the method teaches; the held-out rows must have this side.
        replay: whether `data.english_ratio` turns a share of the rows into English ones.
        inner_losses: whether `supervision` applies.
        needs_english: whether every training row must have its English side.
    """

    name: str
    summary: str
    main_language: Language
    replay: bool
    inner_losses: bool
    needs_english: bool

    def rewriter(self, rows: Sequence[Any], settings: Any) -> Callable[[int, Any], Any] | None:
        """Return a function from a row's place and the row to the row that is trained; None for the rows as they are.

        Args:
            rows: all rows to train on (`pivotune.data.rows.Row`).
            settings: the run's configuration, or the trainer's arguments.
        """
        ...

    def plan(self, replayed: np.ndarray) -> ExamplePlan:
        """Return the training examples of all rows; `replayed` (rows,) bool marks rows replayed in English."""
        ...


def required_sides(method: Method, english_ratio: float, *, heldout: bool = False) -> RequiredSides:
    """Return the sides that rows need: for held-out rows the main language alone."""
    replay = f"data.english_ratio {english_ratio:g} (0 for none)"
    trained = method.needs_english or (method.replay and english_ratio > 0)
    return RequiredSides(
        target=method.main_language == "target",
        english=method.main_language == "english" or (trained and not heldout),
        needed_by=f"method {method.name}" if method.needs_english else replay,
    )
