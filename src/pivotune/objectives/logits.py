"""The logits signal: inner layers predict English tokens through the model's own frozen head.

L_LC = -log P(x_en | x; layers 1..i, W_out) and L_ET = -log P(y_en | x; layers 1..j, W_out) (arXiv 2503.01275, section
"Deep supervision with logits"). The paper leaves open how a sequence is predicted at an inner layer; both readings are
offered (docs/method.md): `autoregressive` follows the chain rule, `positional` lays the English tokens on the target's
positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pivotune.model.architecture import Architecture
from pivotune.model.branches import Batch, BranchStates
from pivotune.model.lens import Norm, frozen_norm
from pivotune.objectives.cross_entropy import cross_entropy_sum
from pivotune.objectives.terms import Term


def autoregressive_loss(architecture: Architecture, branch: BranchStates, *, norm: Norm) -> Term:
    """Chain rule over the branch: token t of the English text is predicted from the prompt and English tokens < t.

    Args:
        branch: raw states (N, width) after the supervised layer, and the N tokens they predict.
        norm: `final` recomputes the final norm from these states (frozen), `none` leaves it out.

    Returns:
        Sum of the negative log-likelihoods in nats, and N.
    """
    return _inner_cross_entropy(architecture, branch.hidden_states, branch.labels, norm)


def positional_loss(architecture: Architecture, hidden_states: Tensor, batch: Batch, side: str, *, norm: Norm) -> Term:
    """English tokens as labels on the target's own positions, cut to the shorter side.

    For `query` the state at the t-th query token is asked for the t-th English query token; for `answer` the state that
    predicts the t-th answer token is asked for the t-th English answer token.

    Args:
        hidden_states: raw `h_k` of the main pass, (B, T, width).
        side: `query` or `answer`.
    """
    positions, labels = positional_targets(batch, side)
    return _inner_cross_entropy(architecture, hidden_states[positions], labels, norm)


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


def _inner_cross_entropy(architecture: Architecture, hidden_states: Tensor, labels: Tensor, norm: Norm) -> Term:
    normed = frozen_norm(architecture, hidden_states) if norm == "final" else hidden_states
    loss = cross_entropy_sum(architecture, normed, labels, frozen_head=True)
    return Term(loss, torch.tensor(labels.numel(), device=labels.device))
