"""L_TFT = -log P(y | x): the usual next-token loss of the answer, at the top of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from pivotune.kernels.cross_entropy import cross_entropy_sum, shifted
from pivotune.models.architecture import Architecture
from pivotune.objectives.base import LossTerm


def next_token_loss(architecture: Architecture, final_states: Tensor, labels: Tensor) -> LossTerm:
    """Return the cross-entropy of the answer in nats, summed, and its number of tokens.

    Args:
        final_states: output of the final norm, (B, T, width).
        labels: (B, T), -100 outside the answer.
    """
    states, targets = shifted(final_states, labels)
    loss = cross_entropy_sum(architecture, states, targets, frozen_head=False)
    return LossTerm(loss, torch.tensor(targets.numel(), device=targets.device))
