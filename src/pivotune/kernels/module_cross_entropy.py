"""Cross-entropy through a head that has to be called as a module, chunk by chunk.

For quantized heads, heads with adapters, heads wrapped by PEFT or with hooks: what they compute is theirs, so each chunk
goes through the module and autograd, and its logits are dropped before the next chunk. Slower than
`pivotune.kernels.linear_cross_entropy` for a trained head (its projection is computed twice), equal in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from pivotune.kernels.chunked_linear_head import even_chunks, rows_per_chunk
from pivotune.kernels.linear_cross_entropy import LabelScores, refuse_second_derivative
from pivotune.models.architecture import Architecture
from pivotune.models.device_kind import device_kind
from pivotune.models.sharding import call_gathered


def module_cross_entropies(architecture: Architecture, normed: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every row; neither the head nor adapters in it get a gradient.

    Args:
        normed: states after the final norm, (N, width); gradient reaches them, computed in this forward pass.
        labels: token ids, (N,).

    Returns:
        (N,) in nats, float32 (float64 for a head in float64). Differentiable once.
    """
    if torch.is_grad_enabled() and normed.requires_grad:
        losses = _FrozenModule.apply(normed, architecture, labels)
        assert isinstance(losses, Tensor)
        return losses
    with torch.no_grad():
        chunks = _chunks(architecture, normed)
        losses = [_losses(architecture, normed[rows], labels[rows]) for rows in chunks]
    return torch.cat(losses) if losses else _no_losses(normed)


def module_cross_entropy_sum(architecture: Architecture, normed: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of all rows, with gradient to the states and to whatever the head trains.

    Each chunk's logits are computed anew in the backward pass.
    """
    if not any(parameter.requires_grad for parameter in architecture.lm_head.parameters()):
        return module_cross_entropies(architecture, normed, labels).sum()
    if not len(normed):
        # What the head trains gets a gradient of zeros: beside other ranks, one without a gradient keeps them waiting.
        nothing = _losses(architecture, normed.new_zeros(1, normed.shape[1]), labels.new_zeros(1))
        return nothing.sum() * 0 + normed.sum()
    total = normed.new_zeros((), dtype=_exact(normed.dtype))
    for rows in _chunks(architecture, normed):
        losses = checkpoint(_losses, architecture, normed[rows], labels[rows], use_reentrant=False)
        assert isinstance(losses, Tensor)
        total = total + losses.sum()
    return total


@torch.no_grad()
def module_label_scores(architecture: Architecture, normed: Tensor, labels: Tensor) -> LabelScores:
    """How probable every row's label is, and whether greedy decoding would choose it. No gradient."""
    scores = [_no_losses(normed)]
    greedy = [labels.new_empty(0, dtype=torch.bool)]
    for rows in _chunks(architecture, normed):
        logits = _logits(architecture, normed[rows])
        scores.append(-F.cross_entropy(logits, labels[rows], reduction="none"))
        greedy.append(logits.argmax(dim=1) == labels[rows])
    return LabelScores(torch.cat(scores), torch.cat(greedy))


class _FrozenModule(Function):
    """Gradients of the rows, taken chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx: Any, normed: Tensor, architecture: Architecture, labels: Tensor) -> Tensor:
        gradient, losses = torch.empty_like(normed), [_no_losses(normed)]
        for rows in _chunks(architecture, normed):
            chunk = normed[rows].detach().requires_grad_()
            with torch.enable_grad():
                chunk_losses = _losses(architecture, chunk, labels[rows])
                # Asked for the states alone, autograd computes nothing for the head's own parameters.
                (gradient[rows],) = torch.autograd.grad(chunk_losses.sum(), chunk)
            losses.append(chunk_losses.detach())
        ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative()
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0][:, None]).to(gradient.dtype), None, None


def _chunks(architecture: Architecture, normed: Tensor) -> list[slice]:
    # A packed 4-bit weight does not have the vocabulary as its first dimension.
    vocab_size = getattr(architecture.lm_head, "out_features", None) or architecture.vocab_size
    return list(even_chunks(len(normed), rows_per_chunk(device_kind(normed), vocab_size)))


def _logits(architecture: Architecture, states: Tensor) -> Tensor:
    logits = architecture.transform_logits(call_gathered(architecture.lm_head, states))
    return logits.to(_exact(logits.dtype))


def _losses(architecture: Architecture, states: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_logits(architecture, states), labels, reduction="none")


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _no_losses(normed: Tensor) -> Tensor:
    return normed.new_empty(0, dtype=_exact(normed.dtype))
