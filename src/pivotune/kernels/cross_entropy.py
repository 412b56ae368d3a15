"""Next-token cross-entropy from hidden states, on labelled positions only.

The place where every vocabulary-sized tensor of training and scoring is made, a chunk of rows at a time. Which way the
head goes:

- a plain linear layer: `pivotune.kernels.linear_cross_entropy`, or Liger's fused loss on CUDA for the trained head;
- anything else (quantized, with adapters or hooks, wrapped): called as the module it is, by
  `pivotune.kernels.module_cross_entropy`.

Under ZeRO-3 either way runs in the place of the head's own forward, where its weights are gathered: once for each loss,
since all ranks have to gather equally often, whatever the number of their rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar, cast

from torch import Tensor

from pivotune.kernels.chunked_linear_head import LinearHead
from pivotune.kernels.fused_cross_entropy import fused_cross_entropy_sum, fused_loss_fits
from pivotune.kernels.linear_cross_entropy import (
    LabelScores,
    linear_cross_entropies,
    linear_cross_entropy_sum,
    linear_label_scores,
)
from pivotune.kernels.module_cross_entropy import (
    module_cross_entropies,
    module_cross_entropy_sum,
    module_label_scores,
)
from pivotune.models.architecture import Architecture
from pivotune.models.head import is_plain_linear, is_plain_matrix
from pivotune.models.sharding import in_place_of_forward, is_partitioned, whole

IGNORED = -100
_Result = TypeVar("_Result")


def cross_entropies(architecture: Architecture, normed: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] of N positions, with the model's soft-cap and logit scale; the head is frozen.

    The gradient of the states is computed in this forward pass, and only where one is wanted: under `no_grad` this is
    how likelihoods are scored.

    Args:
        normed: states after the final norm, (N, width); position n predicts `labels[n]`.
        labels: token ids, (N,).

    Returns:
        (N,) in nats, float32; float64 for a model in float64. Differentiable once.

    Raises:
        ValueError: states and labels do not match.
    """
    _check(normed, labels)
    return _with_head(architecture, partial(_cross_entropies, architecture), normed, labels)


def _cross_entropies(architecture: Architecture, normed: Tensor, labels: Tensor) -> Tensor:
    head = _linear_head(architecture, frozen=True)
    if head is None:
        return module_cross_entropies(architecture, normed, labels)
    return linear_cross_entropies(_scaled(architecture, normed), head, labels)


def cross_entropy_sum(architecture: Architecture, normed: Tensor, labels: Tensor, *, frozen_head: bool) -> Tensor:
    """Sum over N positions of -log softmax(logits)[label], with the model's soft-cap and logit scale.

    Args:
        normed: states after the final norm, (N, width); position n predicts `labels[n]`.
        labels: token ids, (N,).
        frozen_head: the head takes part in the forward pass and gets no gradient (inner losses).

    Returns:
        Scalar float32; float64 for a model in float64; 0 with a gradient history where N is 0. Differentiable once, and
        with a trained head backward runs once.

    Raises:
        ValueError: states and labels do not match.
    """
    if frozen_head:
        return cross_entropies(architecture, normed, labels).sum()
    _check(normed, labels)
    return _with_head(architecture, partial(_trained_head_sum, architecture), normed, labels)


def _trained_head_sum(architecture: Architecture, normed: Tensor, labels: Tensor) -> Tensor:
    head = _linear_head(architecture, frozen=False)
    if head is None:
        return module_cross_entropy_sum(architecture, normed, labels)
    states = _scaled(architecture, normed)
    if fused_loss_fits(states, head):
        return fused_cross_entropy_sum(states, head, labels)
    return linear_cross_entropy_sum(states, head, labels)


def score_labels(architecture: Architecture, normed: Tensor, labels: Tensor) -> LabelScores:
    """Log-probability of every label in nats (N,), and whether greedy decoding would choose it (N,) bool. No gradient.

    Args:
        normed: states after the final norm, (N, width); position n predicts `labels[n]`.
        labels: token ids, (N,).

    Raises:
        ValueError: states and labels do not match.
    """
    _check(normed, labels)
    return _with_head(architecture, partial(_label_scores, architecture), normed, labels)


def _label_scores(architecture: Architecture, normed: Tensor, labels: Tensor) -> LabelScores:
    head = _linear_head(architecture, frozen=True)
    if head is None:
        return module_label_scores(architecture, normed, labels)
    return linear_label_scores(_scaled(architecture, normed), head, labels)


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


def _check(normed: Tensor, labels: Tensor) -> None:
    if normed.ndim != 2 or normed.shape[:-1] != labels.shape:
        raise ValueError(f"states of shape {tuple(normed.shape)} do not match labels of shape {tuple(labels.shape)}")


def _with_head(
    architecture: Architecture, function: Callable[[Tensor, Tensor], _Result], normed: Tensor, labels: Tensor
) -> _Result:
    """`function(normed, labels)` where the head's weights are whole."""
    head = architecture.lm_head
    if not is_partitioned(head):
        return function(normed, labels)
    return in_place_of_forward(head, function, normed, labels)


def _linear_head(architecture: Architecture, *, frozen: bool) -> LinearHead | None:
    """The head as plain tensors; None where it has to be called as a module."""
    head = architecture.lm_head
    if not is_plain_linear(head):
        return None
    weight, bias = (
        None if part is None else whole(cast(Tensor, part), frozen=frozen) for part in (head.weight, head.bias)
    )
    if weight is None or not is_plain_matrix(weight):
        return None
    if bias is not None and architecture.logit_scale != 1.0:
        bias = bias * architecture.logit_scale
    return LinearHead(weight, bias, architecture.softcap)


def _scaled(architecture: Architecture, normed: Tensor) -> Tensor:
    """A linear head's logit scale applied to its states, which are smaller than its logits."""
    return normed if architecture.logit_scale == 1.0 else normed * architecture.logit_scale
