"""One sweep over labelled rows through a linear head, chunk by chunk: losses, gradients and greedy choices.

For N rows the logits `z = W h + b`, soft-capped where the model does so, are made for a few rows at a time in one
workspace. A chunk's gradient `softmax(z) - onehot(label)` replaces its logits in place and is multiplied back at once, so
that nothing of the size of N times the vocabulary ever exists.

Products run in the dtype of the states, or in autocast's; logits become float32 before the soft-cap and the softmax
(float64 stays float64). This is what `F.linear` and `F.cross_entropy` of `logits.float()` compute, up to rounding.

Letters: N rows, V vocabulary, R rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pivotune.models.device_kind import device_kind

_MIB = 2**20
# Measured for width 576, V = 49,152 and 1,024 rows, time against naive: frozen head 0.84 for 128 rows at once, 0.82 for 256
# and 0.81 for 512 (bare products 0.79), in bfloat16 0.50, 0.44 and 0.48; trained head 0.91, 0.89 and 0.87. 48 MiB are 256
# of those rows and a twelfth of the memory that naive takes.
_CPU_LOGITS, _CPU_LEAST_ROWS = 48 * _MIB, 128
# Rows whose softmax is computed at once on a CPU: few enough that the passes over them find them in the cache.
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


class Wanted(NamedTuple):
    """What a sweep computes beside the losses."""

    states: bool = False
    weight: bool = False
    bias: bool = False
    greedy: bool = False

    @property
    def gradient(self) -> bool:
        return self.states or self.weight or self.bias


@dataclass
class Sweep:
    """Losses (N,), the gradients of their sum, and whether each label is the greedy choice (N,)."""

    losses: Tensor
    states: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    greedy: Tensor | None


def rows_per_chunk(device_type: str, vocab_size: int) -> int:
    """How many rows' logits exist at once.

    On a CPU as many as 48 MiB hold in float32, and at least 128; elsewhere as many as 256 MiB hold, and at least 256.
    """
    budget, least = (_CPU_LOGITS, _CPU_LEAST_ROWS) if device_type == "cpu" else (_GPU_LOGITS, _GPU_LEAST_ROWS)
    return max(least, budget // (vocab_size * 4))


def even_chunks(count: int, most: int) -> Iterator[slice]:
    """Cut `count` rows into as few parts of at most `most` rows as there can be, all of nearly one size."""
    parts = -(-count // most)
    for part in range(parts):
        yield slice(count * part // parts, count * (part + 1) // parts)


@torch.no_grad()
def sweep(states: Tensor, head: LinearHead, labels: Tensor, wanted: Wanted) -> Sweep:
    """One pass over all rows, a chunk at a time."""
    states, head = _cast_as_autocast_would(states, head)
    with torch.autocast(states.device.type, enabled=False):
        result = _allocate(states, head, wanted)
        workspace = _Workspace.of(states, head, wanted)
        for rows in even_chunks(len(states), len(workspace.logits)):
            logits = workspace.logits[: rows.stop - rows.start]
            _project(states[rows], head, logits)
            _score_chunk(logits, labels, rows, head, workspace, wanted, result)
            _multiply_back(logits, states[rows], rows, head, result)
    return result


@dataclass
class _Workspace:
    """Buffers that all chunks of a sweep share.

    Attributes:
        logits: of one chunk, (R, V), in the dtype of the products.
        softmax_rows: rows whose softmax is computed at once.
        exact: logits of those rows in float32; None where `logits` are exact enough themselves.
        slope: derivative of the soft-cap for those rows; None where there is none, or no gradient.
    """

    logits: Tensor
    softmax_rows: int
    exact: Tensor | None
    slope: Tensor | None

    @classmethod
    def of(cls, states: Tensor, head: LinearHead, wanted: Wanted) -> _Workspace:
        device_type, vocab_size, exact = device_kind(states), len(head.weight), _exact_dtype(states.dtype)
        rows = max(1, min(len(states), rows_per_chunk(device_type, vocab_size)))
        cached = max(1, _CPU_SOFTMAX // (vocab_size * exact.itemsize)) if device_type == "cpu" else rows
        shape = min(rows, cached), vocab_size
        return cls(
            logits=states.new_empty(rows, vocab_size),
            softmax_rows=shape[0],
            exact=None if exact == states.dtype else states.new_empty(shape, dtype=exact),
            slope=states.new_empty(shape, dtype=exact) if head.softcap and wanted.gradient else None,
        )


def _cast_as_autocast_would(states: Tensor, head: LinearHead) -> tuple[Tensor, LinearHead]:
    """The operands in autocast's dtype where it is on; like autocast itself, this leaves float64 alone."""
    device_type = states.device.type
    if not torch.is_autocast_enabled(device_type) or states.dtype == torch.float64:
        return states, head
    dtype = torch.get_autocast_dtype(device_type)
    bias = None if head.bias is None else head.bias.to(dtype)
    return states.to(dtype), LinearHead(head.weight.to(dtype), bias, head.softcap)


def _exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax, losses and sums over chunks, for products in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _allocate(states: Tensor, head: LinearHead, wanted: Wanted) -> Sweep:
    exact = _exact_dtype(states.dtype)
    # The first chunk overwrites the weight gradient, where there is one.
    fill = torch.empty_like if len(states) else torch.zeros_like
    return Sweep(
        losses=states.new_empty(len(states), dtype=exact),
        states=torch.empty_like(states) if wanted.states else None,
        weight=fill(head.weight, dtype=exact) if wanted.weight else None,
        bias=torch.zeros_like(head.bias, dtype=exact) if wanted.bias and head.bias is not None else None,
        greedy=states.new_empty(len(states), dtype=torch.bool) if wanted.greedy else None,
    )


def _project(states: Tensor, head: LinearHead, logits: Tensor) -> None:
    """`W h + b` into `logits` (R, V)."""
    if head.bias is None:
        torch.mm(states, head.weight.T, out=logits)
    else:
        torch.addmm(head.bias, states, head.weight.T, out=logits)


def _score_chunk(
    logits: Tensor,
    labels: Tensor,
    rows: slice,
    head: LinearHead,
    workspace: _Workspace,
    wanted: Wanted,
    result: Sweep,
) -> None:
    """Write losses and greedy choices of the chunk `rows`; the gradient replaces its logits where one is wanted."""
    for part in even_chunks(len(logits), workspace.softmax_rows):
        place = slice(rows.start + part.start, rows.start + part.stop)
        count = part.stop - part.start
        exact = logits[part] if workspace.exact is None else workspace.exact[:count].copy_(logits[part])
        slope = None if workspace.slope is None else workspace.slope[:count]
        if head.softcap:
            _softcap_in_place(exact, head.softcap, slope)
        if result.greedy is not None:
            result.greedy[place] = exact.argmax(dim=1) == labels[place]
        result.losses[place] = _softmax_in_place(exact, labels[place])
        if wanted.gradient:
            _gradient_in_place(exact, labels[place], slope)
            if workspace.exact is not None:
                logits[part].copy_(exact)


def _softcap_in_place(logits: Tensor, softcap: float, slope: Tensor | None) -> None:
    """`c tanh(z / c)`, whose derivative 1 - tanh^2 goes to `slope`."""
    logits.div_(softcap).tanh_()
    if slope is not None:
        torch.mul(logits, logits, out=slope).neg_().add_(1)
    logits.mul_(softcap)


def _softmax_in_place(logits: Tensor, labels: Tensor) -> Tensor:
    """Replace logits (R, V) by probabilities and return the cross-entropies (R,)."""
    chosen = logits.gather(1, labels[:, None])[:, 0]
    highest = logits.amax(dim=1)
    torch.softmax(logits, dim=1, out=logits)
    # The largest probability is 1 / sum(exp(z - max)): the log-sum-exp without a second pass of exponentials, and
    # without the logarithm of a label's probability, which may be too small for float32.
    return (highest - chosen) - logits.amax(dim=1).log()


def _gradient_in_place(probabilities: Tensor, labels: Tensor, slope: Tensor | None) -> None:
    """Turn probabilities (R, V) into the gradient of the summed losses with respect to the projections."""
    minus_one = probabilities.new_full((1, 1), -1.0).expand(len(labels), 1)
    probabilities.scatter_add_(1, labels[:, None], minus_one)
    if slope is not None:
        probabilities.mul_(slope)


def _multiply_back(gradient: Tensor, states: Tensor, rows: slice, head: LinearHead, result: Sweep) -> None:
    """Gradients of a chunk's states, and what it adds to those of weight and bias."""
    if result.states is not None:
        torch.mm(gradient, head.weight, out=result.states[rows])
    if result.weight is not None:
        _add_product(result.weight, gradient, states, first=rows.start == 0)
    if result.bias is not None:
        result.bias += gradient.sum(dim=0, dtype=result.bias.dtype)


def _add_product(total: Tensor, gradient: Tensor, states: Tensor, *, first: bool) -> None:
    """`total += gradient^T states` (V, width); the first time `total` holds nothing yet."""
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
