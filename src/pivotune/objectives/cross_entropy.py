"""Next-token cross-entropy from hidden states, on labelled positions only.

The place where every vocabulary-sized tensor of training is made.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pivotune.model.architecture import Architecture
from pivotune.model.lens import readout

IGNORED = -100


def cross_entropy_sum(architecture: Architecture, normed: Tensor, labels: Tensor, *, frozen_head: bool) -> Tensor:
    """Sum over N positions of -log softmax(logits)[label], with the model's soft-cap and logit scale.

    Args:
        normed: states after the final norm, (N, width); position n predicts `labels[n]`.
        labels: token ids, (N,).
        frozen_head: the head takes part in the forward pass and gets no gradient (inner losses).

    Returns:
        Scalar float32; 0 with a gradient history where N is 0.
    """
    if normed.shape[:-1] != labels.shape:
        raise ValueError(f"states of shape {tuple(normed.shape)} do not match labels of shape {tuple(labels.shape)}")
    logits = readout(architecture, normed, frozen=frozen_head).float()
    return F.cross_entropy(logits, labels, reduction="sum")


def shifted(hidden_states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pick the positions that predict a labelled token.

    Args:
        hidden_states: (B, T, width).
        labels: (B, T), -100 where nothing is predicted; not shifted.

    Returns:
        States (N, width) and their labels (N,), row by row.
    """
    wanted = labels[:, 1:] != IGNORED
    return hidden_states[:, :-1][wanted], labels[:, 1:][wanted]
