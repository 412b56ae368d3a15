"""The way between packed tokens, which lie behind each other, and padded tensors of rows, and back.

Every packed token is taken once at most, so that gradients are copied too, where indexing would add them up one by one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Where packed tokens go in a padded tensor of shape (rows, length).

    Attributes:
        gather: (rows * length,) the packed position that fills each padded place. Padding repeats some token: whatever
            stands there is not attended to and not read.
        padded: (m,) places that are no padding, flattened; each holds a packed token of its own.
        contiguous: (start, stop) where the padded tensor is this very stretch of the packed one, so that no copy is needed.
    """

    rows: int
    length: int
    gather: Tensor
    padded: Tensor
    contiguous: tuple[int, int] | None = None

    @cached_property
    def packed(self) -> Tensor:
        """(m,) packed positions that are really taken."""
        return self.gather[self.padded]

    def to(self, device: torch.device) -> Scatter:
        """The same on `device`."""
        return replace(
            self,
            gather=moved(self.gather, device),
            padded=moved(self.padded, device),
        )


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, without waiting for it."""
    return tensor.to(device, non_blocking=True)


class _Take(torch.autograd.Function):
    """Packed (N, ...) to padded (rows * length, ...). A packed place is taken once at most, so its gradient is a copy."""

    @staticmethod
    def forward(ctx: FunctionCtx, packed: Tensor, gather: Tensor, sources: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(sources, places)
        ctx.num_tokens = len(packed)  # type: ignore[attr-defined]
        return packed.index_select(0, gather)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        sources, places = ctx.saved_tensors  # type: ignore[attr-defined]
        result = gradient.new_zeros((ctx.num_tokens, *gradient.shape[1:]))  # type: ignore[attr-defined]
        return result.index_copy_(0, sources, gradient.index_select(0, places)), None, None, None


class _Give(torch.autograd.Function):
    """Padded (rows * length, ...) to packed (m, ...): the other way round; padding gets no gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, padded: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(padded)  # type: ignore[attr-defined]
        return padded.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (places,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient.new_zeros((ctx.size, *gradient.shape[1:])).index_copy_(0, places, gradient), None  # type: ignore[attr-defined]


def take(packed: Tensor, scatter: Scatter) -> Tensor:
    """Packed tokens (N, ...) as a padded tensor (rows, length, ...)."""
    if scatter.contiguous is not None:
        start, stop = scatter.contiguous
        result = packed[start:stop]
    else:
        result = _Take.apply(packed, scatter.gather, scatter.packed, scatter.padded)
    return result.unflatten(0, (scatter.rows, scatter.length))


def give(padded: Tensor, scatter: Scatter) -> Tensor:
    """The tokens of a padded tensor (rows, length, ...) as packed ones (m, ...), in packed order."""
    flat = padded.flatten(0, 1)
    return flat if scatter.contiguous is not None else _Give.apply(flat, scatter.padded)


def pick(packed: Tensor, positions: Tensor) -> Tensor:
    """The tokens (m, ...) of `packed` (N, ...) at `positions` (m,), each of which is there once."""
    return _Give.apply(packed, positions)
