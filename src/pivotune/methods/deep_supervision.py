"""Deep supervision (arXiv 2503.01275): translated fine-tuning whose rows carry their English side for the inner losses."""

from __future__ import annotations

from pivotune.methods.base import Method

DEEP_SUPERVISION = Method(
    name="deep-supervision",
    summary="Deep supervision fine-tuning: the answer's cross-entropy in the target language, and losses at "
    "inner layers that use the parallel English text ([arXiv 2503.01275](https://arxiv.org/abs/2503.01275)).",
    main_language="target",
    replay=True,
    inner_losses=True,
    needs_english=True,
)
