"""The baselines that train one language with L_TFT alone (arXiv 2503.01275, section "Baselines")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pivotune.methods.base import ExamplePlan, Language


@dataclass(frozen=True, kw_only=True)
class PlainFineTuning:
    """Fine-tuning on one side of every row; a method as in `pivotune.methods.base.Method`."""

    name: str
    summary: str
    main_language: Language
    replay: bool
    inner_losses: bool = False
    needs_english: bool = False
    pivot_marker: str | None = None

    def rewriter(self, rows: Sequence[Any], settings: Any) -> Callable[[int, Any], Any] | None:
        return None

    def plan(self, replayed: np.ndarray) -> ExamplePlan:
        """One example a row, in the main language or replayed in English."""
        english = replayed | (self.main_language == "english")
        return ExamplePlan(
            rows=np.arange(len(replayed)),
            english_prompt=english,
            english_answer=english,
            parallel=np.full(len(replayed), self.inner_losses) & ~english,
        )


ENGLISH_ONLY = PlainFineTuning(
    name="english-only",
    summary="Supervised fine-tuning (SFT) on the English side of the rows.",
    main_language="english",
    replay=False,
    needs_english=True,
)
TFT = PlainFineTuning(
    name="tft",
    summary="Translated fine-tuning (TFT): the answer's cross-entropy in the target language.",
    main_language="target",
    replay=True,
)
