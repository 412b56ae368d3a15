"""Cross-lingual rows: prompt and answer in different languages, or a text to translate, trained with L_TFT alone.

The control of deep supervision: the same English answer after the same prompt, without inner layers. If inner supervision
does not beat it, it adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from pivotune.methods.base import Method, check_named
from pivotune.text.languages import find_language


@dataclass(frozen=True, kw_only=True)
class CrossLingual(Method):
    """TFT with shares of other rows (`cross_lingual` in the settings); the number of rows stays the same."""

    def rewriter(self, rows: Sequence[Any], settings: Any) -> Callable[[int, Any], Any]:
        """Draw the rows of each kind by the seed and their number; English replay is drawn independently.

        Raises:
            UsageError: translations without a target language, whose name the prompts need, or into an unknown one.
        """
        shares, codes = settings.cross_lingual, settings.data.languages
        if shares.translations:
            check_named(codes, "cross_lingual.translations: prompts")
        half = shares.translations / 2
        kinds = (english_answer, english_prompt, into_english, partial(from_english, *codes[:1]))
        drawn = [shares.english_answers, shares.english_prompts, half, half]
        kind_of = draw_kinds(drawn, len(rows), np.random.default_rng(settings.seed))

        def rewrite(place: int, row: Any) -> Any:
            kind = int(kind_of[place])
            return kinds[kind](row) if kind < len(kinds) else row

        return rewrite


def draw_kinds(shares: Sequence[float], num_rows: int, generator: np.random.Generator) -> np.ndarray:
    """Return the kind of every row, int64 (rows,): exact shares, in random places; `len(shares)` for the rest."""
    ends = np.cumsum(shares) * num_rows
    return np.searchsorted(ends.round(), generator.permutation(num_rows), side="right")


def english_answer(row: Any) -> Any:
    """Return the row with its English answer."""
    return replace(row, completion=row.completion_en)


def english_prompt(row: Any) -> Any:
    """Return the row with its English prompt, input and earlier turns."""
    return replace(row, prompt=row.prompt_en, input=row.input_en, history=row.history_en)


def into_english(row: Any) -> Any:
    """Return the task to translate the row's answer into English."""
    prompt = f"Translate into English:\n\n{row.completion}"
    return replace(row, prompt=prompt, input="", history=(), completion=row.completion_en)


def from_english(language: str, row: Any) -> Any:
    """Return the task to translate the row's English answer into the row's own language, or `language` without one."""
    name = find_language(row.language or language).name
    return replace(row, prompt=f"Translate into {name}:\n\n{row.completion_en}", input="", history=())


CROSS_LINGUAL = CrossLingual(
    name="cross-lingual",
    summary="Cross-lingual fine-tuning: translated fine-tuning with shares of rows whose prompt and answer differ in "
    "language, or that translate one into the other (`cross_lingual` below).",
    main_language="target",
    replay=True,
    needs_english=True,
)
