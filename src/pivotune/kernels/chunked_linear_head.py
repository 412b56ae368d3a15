"""Cross-entropy through a linear head, chunk by chunk, with its gradients computed in the forward pass.

The logits `z = W h + b`, soft-capped if the model does so, are computed for a few rows at a time in one workspace. The
gradient `softmax(z) - onehot(label)` replaces a chunk's logits in place and is multiplied back at once: 2 matrix products
for a frozen head and 3 for a trained one, none of them in the backward pass.

Products run in the dtype of the states, or in autocast's; logits become float32 before the soft-cap and the softmax
(float64 stays float64).

Letters: N rows, V vocabulary, R rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from pivotune.models.sharding import device_kind

_MIB = 2**20
# Measured for width 576, V = 49,152 and 1,024 rows, time against naive: frozen head 0.84 for 128 rows at once, 0.82 for 256
# and 0.81 for 512 (bare products 0.79), in bfloat16 0.50, 0.44 and 0.48; trained head 0.91, 0.89 and 0.87. 48 MiB are 256
# of those rows and a twelfth of the memory that naive takes.
_CPU_LOGITS, _CPU_LEAST_ROWS = 48 * _MIB, 128
# Softmax of a few rows at a time on a CPU: they stay in the cache between the passes over them.
_CPU_SOFTMAX = 4 * _MIB
_GPU_LOGITS, _GPU_LEAST_ROWS = 256 * _MIB, 256
# Part of a half-precision weight gradient that is computed before it is added to the float32 sum. Adding all of it at
# once takes five times as long as its product on a CPU.
_CPU_GRADIENT_PART, _GPU_GRADIENT_PART = 4 * _MIB, 64 * _MIB


@dataclass(frozen=True)
class LinearHead:
    """`softcap * tanh((W h + b) / softcap)`: weight (V, width), bias (V,) or None, soft-cap or None."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None


class LabelScores(NamedTuple):
    """Per row: log-probability of the label in nats (N,), and True for a label that is the most probable token (N,)."""

    log_probabilities: Tensor
    greedy: Tensor


def linear_cross_entropies(states: Tensor, head: LinearHead, labels: Tensor) -> Tensor:
    """Return the cross-entropy of every row; the head gets no gradient.

    Args:
        states: (N, width); their gradient is computed in this forward pass, if they need one.
        labels: token ids in [0, V), (N,).

    Returns:
        (N,) in nats, float32 (float64 for states in float64). Differentiable once.
    """
    if torch.is_grad_enabled() and states.requires_grad:
        losses = FrozenHead.apply(states, head, labels)
        assert isinstance(losses, Tensor)
        return losses
    return losses_and_gradients(states, head, labels, Wanted()).losses


def linear_cross_entropy_sum(states: Tensor, head: LinearHead, labels: Tensor) -> Tensor:
    """Return the sum of `linear_cross_entropies`, with gradient to the states, the weight and the bias, once."""
    operands = [tensor for tensor in (states, head.weight, head.bias) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands):
        loss = _TrainedHead.apply(states, head.weight, head.bias, head.softcap, labels)
        assert isinstance(loss, Tensor)
        return loss
    return losses_and_gradients(states, head, labels, Wanted()).losses.sum()


def linear_label_scores(states: Tensor, head: LinearHead, labels: Tensor) -> LabelScores:
    """Return the log-probability of every row's label, and the labels that greedy decoding would choose. No gradient."""
    outputs = losses_and_gradients(states, head, labels, Wanted(greedy=True))
    assert outputs.greedy is not None
    return LabelScores(-outputs.losses, outputs.greedy)


class FrozenHead(Function):
    """Losses of rows. Gradients of rows do not mix, so any upstream gradient (N,) scales them exactly."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: LinearHead, labels: Tensor) -> Tensor:
        outputs = losses_and_gradients(states, head, labels, Wanted(states=True))
        ctx.save_for_backward(outputs.states)
        ctx.dtype = states.dtype
        return outputs.losses

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative()
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0][:, None]).to(ctx.dtype), None, None


class _TrainedHead(Function):
    """Sum of the losses. The weight gradient is a sum over rows, so only a scalar upstream gradient can scale it."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, labels: Tensor
    ) -> Tensor:
        wanted = Wanted(*ctx.needs_input_grad[:3])
        outputs = losses_and_gradients(states, LinearHead(weight, bias, softcap), labels, wanted)
        ctx.gradients = outputs.states, outputs.weight, outputs.bias
        ctx.dtypes = states.dtype, weight.dtype, None if bias is None else bias.dtype
        return outputs.losses.sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        if ctx.gradients is None:
            raise RuntimeError(
                "second backward pass through the cross-entropy of a trained head; compute the loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        # Scaled in place if possible: a scaled copy of the weight gradient would take as much memory as the head.
        scaled = (
            None if one is None else one.to(torch.promote_types(one.dtype, dtype)).mul_(upstream[0]).to(dtype)
            for one, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None)


def refuse_second_derivative() -> None:
    """Raise in a backward pass under `create_graph=True`; `once_differentiable` misses constant upstream gradients."""
    if torch.is_grad_enabled():
        raise RuntimeError("this cross-entropy can be differentiated once; create_graph=True needs a second derivative")


# --- the loop over chunks ------------------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """Results beside the losses: gradients of states, weight and bias, and greedy choices."""

    states: bool = False
    weight: bool = False
    bias: bool = False
    greedy: bool = False

    @property
    def gradient(self) -> bool:
        return self.states or self.weight or self.bias


@dataclass
class HeadOutputs:
    """Losses (N,), the gradients of their sum, and True for labels that are the greedy choice (N,)."""

    losses: Tensor
    states: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    greedy: Tensor | None


def rows_per_chunk(device_type: str, vocab_size: int) -> int:
    """Return how many rows' logits exist at once."""
    budget, least = (_CPU_LOGITS, _CPU_LEAST_ROWS) if device_type == "cpu" else (_GPU_LOGITS, _GPU_LEAST_ROWS)
    return max(least, budget // (vocab_size * 4))


def even_chunks(count: int, most: int) -> Iterator[slice]:
    """Cut `count` rows into the fewest parts of at most `most` rows, all of nearly one size."""
    parts = -(-count // most)
    for part in range(parts):
        yield slice(count * part // parts, count * (part + 1) // parts)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of softmax, losses and sums over chunks, for products in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def losses_and_gradients(states: Tensor, head: LinearHead, labels: Tensor, wanted: Wanted) -> HeadOutputs:
    """Go through all rows once, a chunk at a time."""
    states, head = _cast_as_autocast_would(states, head)
    exact = exact_dtype(states.dtype)
    # The first chunk overwrites the weight gradient; without rows there is none.
    fill = torch.empty_like if len(states) else torch.zeros_like
    outputs = HeadOutputs(
        losses=states.new_empty(len(states), dtype=exact),
        states=torch.empty_like(states) if wanted.states else None,
        weight=fill(head.weight, dtype=exact) if wanted.weight else None,
        bias=torch.zeros_like(head.bias, dtype=exact) if wanted.bias and head.bias is not None else None,
        greedy=states.new_empty(len(states), dtype=torch.bool) if wanted.greedy else None,
    )
    with torch.autocast(states.device.type, enabled=False):
        workspace = _Workspace(states, head, wanted)
        for rows in even_chunks(len(states), len(workspace.logits)):
            chunk, logits = states[rows], workspace.logits[: rows.stop - rows.start]
            if head.bias is None:
                torch.mm(chunk, head.weight.T, out=logits)
            else:
                torch.addmm(head.bias, chunk, head.weight.T, out=logits)
            _score_chunk(logits, labels, rows, head.softcap, workspace, wanted, outputs)
            if outputs.states is not None:
                torch.mm(logits, head.weight, out=outputs.states[rows])
            if outputs.weight is not None:
                _add_product(outputs.weight, logits, chunk, first=rows.start == 0)
            if outputs.bias is not None:
                outputs.bias += logits.sum(dim=0, dtype=outputs.bias.dtype)
    return outputs


def _cast_as_autocast_would(states: Tensor, head: LinearHead) -> tuple[Tensor, LinearHead]:
    """Cast the operands to autocast's dtype inside autocast; like autocast itself, leave float64 alone."""
    device_type = states.device.type
    if not torch.is_autocast_enabled(device_type) or states.dtype == torch.float64:
        return states, head
    dtype = torch.get_autocast_dtype(device_type)
    bias = None if head.bias is None else head.bias.to(dtype)
    return states.to(dtype), LinearHead(head.weight.to(dtype), bias, head.softcap)


class _Workspace:
    """Buffers shared by all chunks.

    Attributes:
        logits: of one chunk, (R, V), in the dtype of the products.
        softmax_rows: rows whose softmax is computed at once.
        exact: logits of those rows in float32; None if `logits` are exact enough themselves.
        slope: derivative of the soft-cap for those rows; None without a soft-cap or without a gradient.
    """

    def __init__(self, states: Tensor, head: LinearHead, wanted: Wanted) -> None:
        device_type, vocab_size, exact = device_kind(states), len(head.weight), exact_dtype(states.dtype)
        rows = max(1, min(len(states), rows_per_chunk(device_type, vocab_size)))
        cached = max(1, _CPU_SOFTMAX // (vocab_size * exact.itemsize)) if device_type == "cpu" else rows
        shape = min(rows, cached), vocab_size
        self.logits = states.new_empty(rows, vocab_size)
        self.softmax_rows = shape[0]
        self.exact = None if exact == states.dtype else states.new_empty(shape, dtype=exact)
        self.slope = states.new_empty(shape, dtype=exact) if head.softcap and wanted.gradient else None


def _score_chunk(
    logits: Tensor,
    labels: Tensor,
    rows: slice,
    softcap: float | None,
    workspace: _Workspace,
    wanted: Wanted,
    outputs: HeadOutputs,
) -> None:
    """Write losses and greedy choices of the chunk `rows`; a wanted gradient replaces its logits."""
    for part in even_chunks(len(logits), workspace.softmax_rows):
        place = slice(rows.start + part.start, rows.start + part.stop)
        count = part.stop - part.start
        exact = logits[part] if workspace.exact is None else workspace.exact[:count].copy_(logits[part])
        slope = None if workspace.slope is None else workspace.slope[:count]
        if softcap:
            exact.div_(softcap).tanh_()
            if slope is not None:
                # The derivative of c tanh(z / c) is 1 - tanh^2.
                torch.mul(exact, exact, out=slope).neg_().add_(1)
            exact.mul_(softcap)
        if outputs.greedy is not None:
            outputs.greedy[place] = exact.argmax(dim=1) == labels[place]
        outputs.losses[place] = _softmax_in_place(exact, labels[place])
        if wanted.gradient:
            minus_one = exact.new_full((1, 1), -1.0).expand(count, 1)
            exact.scatter_add_(1, labels[place][:, None], minus_one)
            if slope is not None:
                exact.mul_(slope)
            if workspace.exact is not None:
                logits[part].copy_(exact)


def _softmax_in_place(logits: Tensor, labels: Tensor) -> Tensor:
    """Replace logits (R, V) by probabilities and return the cross-entropies (R,)."""
    chosen = logits.gather(1, labels[:, None])[:, 0]
    highest = logits.amax(dim=1)
    torch.softmax(logits, dim=1, out=logits)
    # The largest probability is 1 / sum(exp(z - max)): the log-sum-exp without a second pass of exponentials, and
    # without the logarithm of a label's probability, which may be too small for float32.
    return (highest - chosen) - logits.amax(dim=1).log()


def _add_product(total: Tensor, gradient: Tensor, states: Tensor, *, first: bool) -> None:
    """Compute `total += gradient^T states` (V, width); the first time `total` is uninitialized."""
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.T, states, beta=0 if first else 1)
        return
    size = _CPU_GRADIENT_PART if device_kind(total) == "cpu" else _GPU_GRADIENT_PART
    for part in even_chunks(len(total), max(1, size // (states.shape[1] * states.element_size()))):
        product = torch.mm(gradient[:, part].T, states)
        if first:
            total[part] = product
        else:
            total[part] += product
