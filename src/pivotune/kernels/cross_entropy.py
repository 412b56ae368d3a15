"""Next-token cross-entropy from hidden states, on labelled positions only.

Every vocabulary-sized tensor of training and scoring is made here, a chunk of rows at a time:

- a plain linear layer by `pivotune.kernels.chunked_linear_head`;
- the same on CUDA, trained, with Liger installed, by Liger's fused loss;
- any other head (quantized, with adapters or hooks, wrapped) is called as a module, chunk by chunk through autograd. For a
  trained head this takes more time: its projection is computed twice.

Under ZeRO-3 each of them runs in place of the head's own forward, with one gather of its weights for each loss, because
all ranks must gather equally often.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pivotune.kernels.chunked_linear_head import (
    FrozenHead,
    LabelScores,
    LinearHead,
    even_chunks,
    exact_dtype,
    linear_cross_entropies,
    linear_cross_entropy_sum,
    linear_label_scores,
    rows_per_chunk,
)
from pivotune.models.architecture import Architecture
from pivotune.models.head import is_plain_linear, is_plain_matrix
from pivotune.models.sharding import call_gathered, device_kind, in_place_of_forward, is_partitioned, whole

IGNORED = -100
_Result = TypeVar("_Result")
_HeadFunction = Callable[[Architecture, Tensor, Tensor], _Result]


def _with_gathered_head(function: _HeadFunction[_Result]) -> _HeadFunction[_Result]:
    """Check the shapes, then run `function(architecture, normed, labels)` with the head's weights gathered."""

    @wraps(function)
    def run(architecture: Architecture, normed: Tensor, labels: Tensor) -> _Result:
        if normed.ndim != 2 or normed.shape[:-1] != labels.shape:
            shapes = tuple(normed.shape), tuple(labels.shape)
            raise ValueError(f"states of shape {shapes[0]} do not match labels of shape {shapes[1]}")
        if not is_partitioned(architecture.lm_head):
            return function(architecture, normed, labels)
        return in_place_of_forward(architecture.lm_head, partial(function, architecture), normed, labels)

    return run


@_with_gathered_head
def cross_entropies(architecture: Architecture, normed: Tensor, labels: Tensor) -> Tensor:
    """Return -log softmax(logits)[label] of N positions, with the model's soft-cap and logit scale; the head is frozen.

    The gradient of the states is computed in this forward pass, if they need one. Under `no_grad` this scores
    likelihoods.

    Args:
        normed: states after the final norm, (N, width); position n predicts `labels[n]`.
        labels: token ids, (N,).

    Returns:
        (N,) in nats, float32; float64 for a model in float64. Differentiable once.

    Raises:
        ValueError: states and labels do not match.
    """
    head = _linear_head(architecture, frozen=True)
    if head is None:
        return _module_cross_entropies(architecture, normed, labels)
    return linear_cross_entropies(_scaled(architecture, normed), head, labels)


def cross_entropy_sum(architecture: Architecture, normed: Tensor, labels: Tensor, *, frozen_head: bool) -> Tensor:
    """Return the sum of `cross_entropies`, a scalar; 0 with a gradient history for N = 0.

    With `frozen_head` the head takes part in the forward pass and gets no gradient (inner losses); with a trained head
    backward runs once. Other arguments and errors as for `cross_entropies`.
    """
    if frozen_head:
        return cross_entropies(architecture, normed, labels).sum()
    return _trained_head_sum(architecture, normed, labels)


@_with_gathered_head
def _trained_head_sum(architecture: Architecture, normed: Tensor, labels: Tensor) -> Tensor:
    head = _linear_head(architecture, frozen=False)
    if head is None:
        return _module_cross_entropy_sum(architecture, normed, labels)
    states = _scaled(architecture, normed)
    if fused_loss_fits(states, head):
        return fused_cross_entropy_sum(states, head, labels)
    return linear_cross_entropy_sum(states, head, labels)


@_with_gathered_head
def score_labels(architecture: Architecture, normed: Tensor, labels: Tensor) -> LabelScores:
    """Return every label's log-probability in nats (N,), and True for labels that greedy decoding would choose (N,).

    Arguments and errors as for `cross_entropies`. No gradient.
    """
    head = _linear_head(architecture, frozen=True)
    if head is None:
        return _module_label_scores(architecture, normed, labels)
    return linear_label_scores(_scaled(architecture, normed), head, labels)


def shifted(hidden_states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pick the positions that predict a labelled token.

    Args:
        hidden_states: (B, T, width).
        labels: (B, T), not shifted; -100 marks tokens that are not predicted.

    Returns:
        States (N, width) and their labels (N,), row by row.
    """
    wanted = labels[:, 1:] != IGNORED
    return hidden_states[:, :-1][wanted], labels[:, 1:][wanted]


def _linear_head(architecture: Architecture, *, frozen: bool) -> LinearHead | None:
    """Return the head as plain tensors, or None if it must be called as a module."""
    head = architecture.lm_head
    if not is_plain_linear(head):
        return None
    weight = whole(cast(Tensor, head.weight), frozen=frozen)
    if not is_plain_matrix(weight):
        return None
    bias = None if head.bias is None else whole(cast(Tensor, head.bias), frozen=frozen)
    if bias is not None and architecture.logit_scale != 1.0:
        bias = bias * architecture.logit_scale
    return LinearHead(weight, bias, architecture.softcap)


def _scaled(architecture: Architecture, normed: Tensor) -> Tensor:
    """Apply a linear head's logit scale to its states, which are smaller than its logits."""
    return normed if architecture.logit_scale == 1.0 else normed * architecture.logit_scale


# --- Liger's fused loss --------------------------------------------------------------------------------------------
# It fuses the softmax, its gradient and the soft-cap into one GPU kernel. Its speed beside ours has not been measured:
# `python -m benchmarks.cross_entropy --device cuda` does that. Torch's `F.linear_cross_entropy` (2.13) is not used: it has
# no soft-cap, its losses of single rows compute the logits twice, and on a CPU (width 576, V = 49,152, float32, 256 rows a
# chunk) it takes 0.91 of naive's time for 1,024 rows and 1.00 for 300, ours 0.87 and 0.92.


def fused_loss_fits(states: Tensor, head: LinearHead) -> bool:
    """Return True if `fused_cross_entropy_sum` can be used: CUDA, a trained weight, one dtype, some rows.

    Not under autocast, which would cast the weight once for every chunk.
    """
    device_type = states.device.type
    one_dtype = states.dtype == head.weight.dtype != torch.float64 and not torch.is_autocast_enabled(device_type)
    trained = torch.is_grad_enabled() and head.weight.requires_grad
    return device_type == "cuda" and len(states) > 0 and trained and one_dtype and _liger_installed()


@cache
def _liger_installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def fused_cross_entropy_sum(states: Tensor, head: LinearHead, labels: Tensor) -> Tensor:
    """Return the sum of all rows' cross-entropies in nats, float32; arguments as for `linear_cross_entropy_sum`."""
    # Imported by name: it needs Triton and is no dependency.
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    # Sums over chunks in float32, as ours are.
    fused = loss(reduction="sum", softcap=head.softcap, accum_dtype=torch.float32)
    return fused(head.weight, states, labels, head.bias).float()


# --- heads that are called as modules ------------------------------------------------------------------------------


def _module_cross_entropies(architecture: Architecture, normed: Tensor, labels: Tensor) -> Tensor:
    """Return `cross_entropies`; neither the head nor adapters in it get a gradient."""
    if torch.is_grad_enabled() and normed.requires_grad:
        losses = _FrozenModule.apply(normed, architecture, labels)
        assert isinstance(losses, Tensor)
        return losses
    with torch.no_grad():
        losses = [_module_losses(architecture, normed[rows], labels[rows]) for rows in _chunks(architecture, normed)]
    return torch.cat([_no_losses(normed), *losses])


def _module_cross_entropy_sum(architecture: Architecture, normed: Tensor, labels: Tensor) -> Tensor:
    """Return `cross_entropy_sum` of a trained head; each chunk's logits are computed again in the backward pass."""
    if not any(parameter.requires_grad for parameter in architecture.lm_head.parameters()):
        return _module_cross_entropies(architecture, normed, labels).sum()
    if not len(normed):
        # Trained parameters get a gradient of zeros: in distributed training other ranks wait for every gradient.
        nothing = _module_losses(architecture, normed.new_zeros(1, normed.shape[1]), labels.new_zeros(1))
        return nothing.sum() * 0 + normed.sum()
    total = normed.new_zeros((), dtype=exact_dtype(normed.dtype))
    for rows in _chunks(architecture, normed):
        losses = checkpoint(_module_losses, architecture, normed[rows], labels[rows], use_reentrant=False)
        assert isinstance(losses, Tensor)
        total = total + losses.sum()
    return total


@torch.no_grad()
def _module_label_scores(architecture: Architecture, normed: Tensor, labels: Tensor) -> LabelScores:
    scores = [_no_losses(normed)]
    greedy = [labels.new_empty(0, dtype=torch.bool)]
    for rows in _chunks(architecture, normed):
        logits = _module_logits(architecture, normed[rows])
        scores.append(-F.cross_entropy(logits, labels[rows], reduction="none"))
        greedy.append(logits.argmax(dim=1) == labels[rows])
    return LabelScores(torch.cat(scores), torch.cat(greedy))


class _FrozenModule(FrozenHead):
    """Gradients of the rows, taken chunk by chunk in the forward pass; `FrozenHead.backward` scales them."""

    @staticmethod
    def forward(ctx: Any, normed: Tensor, architecture: Architecture, labels: Tensor) -> Tensor:
        gradient, losses = torch.empty_like(normed), [_no_losses(normed)]
        for rows in _chunks(architecture, normed):
            chunk = normed[rows].detach().requires_grad_()
            with torch.enable_grad():
                chunk_losses = _module_losses(architecture, chunk, labels[rows])
                # Asked for the states alone, autograd computes nothing for the head's own parameters.
                (gradient[rows],) = torch.autograd.grad(chunk_losses.sum(), chunk)
            losses.append(chunk_losses.detach())
        ctx.save_for_backward(gradient)
        ctx.dtype = normed.dtype
        return torch.cat(losses)


def _chunks(architecture: Architecture, normed: Tensor) -> list[slice]:
    # The first dimension of a packed 4-bit weight is not the vocabulary.
    vocab_size = getattr(architecture.lm_head, "out_features", None) or architecture.vocab_size
    return list(even_chunks(len(normed), rows_per_chunk(device_kind(normed), vocab_size)))


def _module_logits(architecture: Architecture, states: Tensor) -> Tensor:
    logits = architecture.transform_logits(call_gathered(architecture.lm_head, states))
    return logits.to(exact_dtype(logits.dtype))


def _module_losses(architecture: Architecture, states: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_module_logits(architecture, states), labels, reduction="none")


def _no_losses(normed: Tensor) -> Tensor:
    return normed.new_empty(0, dtype=exact_dtype(normed.dtype))
