"""The logits signal: inner layers predict English tokens through the model's own frozen head.

L_LC = -log P(x_en | x; layers 1..i, W_out) and L_ET = -log P(y_en | x; layers 1..j, W_out) (arXiv 2503.01275, section
"Deep supervision with logits"). The paper leaves open how a sequence is predicted at an inner layer; both readings are
offered (docs/method.md): `autoregressive` follows the chain rule, `positional` lays the English tokens on the target's
positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pivotune.forward.passes import Batch
from pivotune.kernels.cross_entropy import cross_entropies
from pivotune.lenses.logit import Norm
from pivotune.models.architecture import Architecture
from pivotune.models.head import frozen_norm
from pivotune.objectives.base import Term


def inner_losses(
    architecture: Architecture, predictions: Mapping[str, tuple[Tensor, Tensor]], *, norm: Norm
) -> dict[str, Term]:
    """-log P of the English tokens through the frozen head, for one or both inner losses in one call of the head.

    Args:
        predictions: name -> raw states (N, width) after the supervised layer, and the N tokens they predict.
        norm: `final` recomputes the final norm from these states (frozen), `none` leaves it out.

    Returns:
        name -> sum of the negative log-likelihoods in nats, and N.
    """
    if not predictions:
        return {}
    states, labels = (torch.cat(parts) for parts in zip(*predictions.values(), strict=True))
    losses = cross_entropies(architecture, frozen_norm(architecture, states) if norm == "final" else states, labels)
    counts = {name: labels.numel() for name, (_, labels) in predictions.items()}
    sums = (part.sum() for part in losses.split(list(counts.values())))
    return {
        name: Term(total, torch.tensor(count, device=total.device))
        for (name, count), total in zip(counts.items(), sums, strict=True)
    }


def positional_predictions(hidden_states: Tensor, batch: Batch, side: str) -> tuple[Tensor, Tensor]:
    """English tokens as labels on the target's own positions, cut to the shorter side.

    For `query` the state at the t-th query token is asked for the t-th English query token; for `answer` the state that
    predicts the t-th answer token is asked for the t-th English answer token.

    Args:
        hidden_states: raw `h_k` of the main pass, (B, T, width).
        side: `query` or `answer`.

    Returns:
        States (N, width) and labels (N,).
    """
    positions, labels = positional_targets(batch, side)
    return hidden_states[positions], labels


def positional_targets(batch: Batch, side: str) -> tuple[Tensor, Tensor]:
    """Positions (B, T) bool of the main sequence that get an English label, and the labels (N,), row by row."""
    if side == "query":
        places = batch["query_mask"]
    else:
        places = torch.zeros_like(batch["query_mask"])
        places[:, :-1] = batch["labels"][:, 1:] >= 0
    english = batch[f"english_{side}_mask"]
    lengths = torch.minimum(places.sum(dim=1), english.sum(dim=1))
    return _first(places, lengths), batch["english_input_ids"][_first(english, lengths)]


def _first(mask: Tensor, lengths: Tensor) -> Tensor:
    """The first `lengths[b]` true places of every row of `mask` (B, T)."""
    return mask & (mask.cumsum(dim=1) <= lengths[:, None])
