"""The feature signal: pooled inner states of the target text move towards those of the English text.

L_LC = 1 - cos(h_i(x_en), h_i(x)) and L_ET = 1 - cos(h_L(x_en...), h_j(x...)) (arXiv 2503.01275, section "Deep
supervision with features"): for conversion both sides at layer i, for thinking the English side at the top layer and the
target side at layer j. The span is the query, or query and answer.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pivotune.forward.passes import Batch
from pivotune.objectives.base import Term

Pooling = Literal["mean", "last"]
Span = Literal["query", "query+answer"]


def feature_loss(target: Tensor, english: Tensor, batch: Batch, *, pooling: Pooling, span: Span) -> Term:
    """Sum over rows with an English side of `1 - cos(pool(english), pool(target))`, and the number of such rows.

    Args:
        target: states of the main sequence, (B, T, width).
        english: states of the English sequence, (B, S, width); detach them before for a one-sided gradient.
        batch: gives the spans, see the batch contract.

    Returns:
        Sum in [0, 2 * rows], float32. A row without an English side adds neither to the sum nor to the count.
    """
    mask = span_masks(batch, span)[1]
    # A pass beside other ranks reads one token where no row has an English side.
    pooled = pool(english[:, : mask.shape[1]], mask, pooling)
    return pooled_feature_loss(target, pooled, batch, pooling=pooling, span=span)


def pooled_feature_loss(target: Tensor, pooled_english: Tensor, batch: Batch, *, pooling: Pooling, span: Span) -> Term:
    """`feature_loss` with an English side that is pooled already.

    Args:
        pooled_english: (B, width); rows without an English side are left out, whatever they hold.
    """
    target_mask, english_mask = span_masks(batch, span)
    rows = english_mask.any(dim=1)
    distances = 1 - F.cosine_similarity(pooled_english.float(), pool(target, target_mask, pooling), dim=-1)
    # No indexing by the mask: on a GPU it would wait for the device.
    return Term(torch.where(rows, distances, 0.0).sum(), rows.sum())


def span_masks(batch: Batch, span: Span) -> tuple[Tensor, Tensor]:
    """Which tokens are pooled on the target side (B, T) and the English side (B, S)."""
    target, english = batch["query_mask"], batch["english_query_mask"]
    if span == "query+answer":
        target, english = target | (batch["labels"] >= 0), english | batch["english_answer_mask"]
    return target, english


def pool(hidden_states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Pool (B, T, width) over the true places of `mask` (B, T) into (B, width), float32.

    `mean` averages them, `last` takes the last of them. A row without any gives zeros for `mean`; for `last` its first
    place, or zeros where there are no places at all.
    """
    if pooling == "last" and mask.shape[1]:
        # The running count reaches its maximum first at the last true place.
        last = mask.long().cumsum(dim=1).argmax(dim=1)
        return hidden_states[torch.arange(len(last), device=last.device), last].float()
    weights = mask.float()
    summed = (hidden_states.float() * weights[..., None]).sum(dim=1)
    return summed / weights.sum(dim=1, keepdim=True).clamp(min=1)
