"""Cross-entropy of a linear head, with its gradients computed in the forward pass.

The forward pass sweeps over the rows (`pivotune.kernels.chunked_linear_head`) and keeps gradients, never logits: 2 matrix
products for a frozen head, 3 for a trained one, none of them in the backward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from pivotune.kernels.chunked_linear_head import LinearHead, Wanted, sweep


class LabelScores(NamedTuple):
    """Per row: log-probability of the label in nats (N,), and whether it is the most probable token (N,) bool."""

    log_probabilities: Tensor
    greedy: Tensor


def linear_cross_entropies(states: Tensor, head: LinearHead, labels: Tensor) -> Tensor:
    """Cross-entropy of every row; the head gets no gradient.

    Args:
        states: (N, width); gradient reaches them, computed in this forward pass where it is needed.
        labels: token ids in [0, V), (N,).

    Returns:
        (N,) in nats, float32 (float64 for states in float64). Differentiable once.
    """
    if torch.is_grad_enabled() and states.requires_grad:
        return _apply(_FrozenHead, states, head, labels)
    return sweep(states, head, labels, Wanted()).losses


def linear_cross_entropy_sum(states: Tensor, head: LinearHead, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of all rows, with gradient to the states, the weight and the bias.

    The first backward pass hands the gradients over; a second one through the same loss is an error.

    Args:
        states: (N, width).
        labels: token ids in [0, V), (N,).

    Returns:
        Scalar in nats, float32 (float64 for states in float64). Differentiable once.
    """
    operands = [tensor for tensor in (states, head.weight, head.bias) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands):
        return _apply(_TrainedHead, states, head.weight, head.bias, head.softcap, labels)
    return sweep(states, head, labels, Wanted()).losses.sum()


def linear_label_scores(states: Tensor, head: LinearHead, labels: Tensor) -> LabelScores:
    """How probable every row's label is, and whether greedy decoding would choose it. No gradient."""
    result = sweep(states, head, labels, Wanted(greedy=True))
    assert result.greedy is not None
    return LabelScores(-result.losses, result.greedy)


class _FrozenHead(Function):
    """Losses of rows whose gradients do not mix: any upstream gradient (N,) scales them exactly."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: LinearHead, labels: Tensor) -> Tensor:
        result = sweep(states, head, labels, Wanted(states=True))
        ctx.save_for_backward(result.states)
        ctx.dtype = states.dtype
        return result.losses

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative()
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0][:, None]).to(ctx.dtype), None, None


class _TrainedHead(Function):
    """The sum of the losses: the weight gradient is a sum over rows, so one upstream number has to scale it."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, labels: Tensor
    ) -> Tensor:
        wanted = Wanted(*ctx.needs_input_grad[:3])
        result = sweep(states, LinearHead(weight, bias, softcap), labels, wanted)
        ctx.gradients = result.states, result.weight, result.bias
        ctx.dtypes = states.dtype, weight.dtype, None if bias is None else bias.dtype
        return result.losses.sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        if ctx.gradients is None:
            raise RuntimeError(
                "second backward pass through the cross-entropy of a trained head: the first one has handed its "
                "gradients over; compute the loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (
            None if gradient is None else _scaled(gradient, upstream[0], dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None)


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """In place where it can be: a scaled copy of the weight gradient would take as much memory as the head."""
    return gradient.to(torch.promote_types(gradient.dtype, dtype)).mul_(factor).to(dtype)


def refuse_second_derivative() -> None:
    """Called in a backward pass: raise where `create_graph=True` asks to differentiate it.

    Torch's `once_differentiable` is silent where the upstream gradient is constant, and the second derivative missing.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "this cross-entropy can be differentiated once; create_graph=True asks for a second derivative"
        )


def _apply(function: type[Function], *operands: Any) -> Tensor:
    loss = function.apply(*operands)
    assert isinstance(loss, Tensor)
    return loss
