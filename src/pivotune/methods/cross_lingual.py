"""Cross-lingual rows: the target prompt with the English answer, trained with L_TFT at the output.

The control of deep supervision: the same English answer after the same prompt, without inner layers. If inner supervision
does not beat it, it adds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pivotune.methods.base import ExamplePlan, Language


@dataclass(frozen=True, kw_only=True)
class CrossLingual:
    """A share of the rows that are not replayed in English keep their target prompt and get the English answer.

    The number of rows stays the same, so that budgets stay equal.
    """

    name: str = "cross-lingual"
    summary: str = (
        "Cross-lingual fine-tuning: translated fine-tuning in which a third of the target rows are answered in English."
    )
    main_language: Language = "target"
    replay: bool = True
    inner_losses: bool = False
    needs_english: bool = True
    share: float = 1 / 3

    def plan(self, replayed: np.ndarray) -> ExamplePlan:
        """One example a row; the same rows for every run with these rows and replay."""
        target = np.flatnonzero(~replayed)
        random = np.random.default_rng(len(replayed))
        chosen = np.zeros(len(replayed), dtype=bool)
        chosen[random.choice(target, round(self.share * len(target)), replace=False)] = True
        return ExamplePlan(
            rows=np.arange(len(replayed)),
            english_prompt=replayed.copy(),
            english_answer=replayed | chosen,
            parallel=np.zeros(len(replayed), dtype=bool),
        )


CROSS_LINGUAL = CrossLingual()
