"""English tokens as labels on the target's own positions, cut to the shorter side (`logits.mode: positional`)."""

from __future__ import annotations

import torch
from torch import Tensor

from pivotune.forward.passes import Batch


def positional_predictions(hidden_states: Tensor, batch: Batch, side: str) -> tuple[Tensor, Tensor]:
    """Return the states (N, width) that get an English label, and the labels (N,).

    For `query` the state at the t-th query token is asked for the t-th English query token; for `answer` the state that
    predicts the t-th answer token is asked for the t-th English answer token.

    Args:
        hidden_states: raw `h_k` of the main pass, (B, T, width).
        side: `query` or `answer`.
    """
    positions, labels = positional_targets(batch, side)
    return hidden_states[positions], labels


def positional_targets(batch: Batch, side: str) -> tuple[Tensor, Tensor]:
    """Return the positions (B, T) bool of the main sequence that get an English label, and the labels (N,), row by row."""
    if side == "query":
        places = batch["query_mask"]
    else:
        places = torch.zeros_like(batch["query_mask"])
        places[:, :-1] = batch["labels"][:, 1:] >= 0
    english = batch[f"english_{side}_mask"]
    lengths = torch.minimum(places.sum(dim=1), english.sum(dim=1))
    return _first(places, lengths), batch["english_input_ids"][_first(english, lengths)]


def _first(mask: Tensor, lengths: Tensor) -> Tensor:
    """Keep the first `lengths[b]` true places of every row of `mask` (B, T)."""
    return mask & (mask.cumsum(dim=1) <= lengths[:, None])
