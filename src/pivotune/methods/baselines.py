"""The baselines that train one language with L_TFT alone (arXiv 2503.01275, section "Baselines")."""

from __future__ import annotations

from pivotune.methods.base import Method

ENGLISH_ONLY = Method(
    name="english-only",
    summary="Supervised fine-tuning (SFT) on the English side of the rows.",
    main_language="english",
    replay=False,
    needs_english=True,
)
TFT = Method(
    name="tft",
    summary="Translated fine-tuning (TFT): the answer's cross-entropy in the target language.",
    main_language="target",
    replay=True,
)
