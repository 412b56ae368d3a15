"""Attention written out as matrix products, for what torch's fused kernels do not do or do slowly.

They cap no products (Gemma-2), and on a CPU they multiply bfloat16 hardly faster than float32: for rows of 270 tokens this
takes 0.6 of the fused kernel's time, for 150 tokens 0.4 (docs/performance.md). Like them it keeps nothing of size queries
x keys for the backward pass but the mask, which all blocks share; the weights are computed again.

Shapes: R rows, H heads, G query heads for each key head, Q queries, K keys, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from pivotune.models.device_kind import device_kind

# Products of some rows at a time: a few MiB stay in the cache of a CPU core, and no long sequence needs much memory.
_ELEMENTS = {"cpu": 2**20, "cuda": 2**28}


def written_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(cap(scaling * query key^T)) value, with cap(z) = softcap * tanh(z / softcap).

    The products are rounded to the dtype of the inputs, as in Transformers' eager attention; the softmax is in float32.

    Args:
        query: (R, heads, Q, D).
        key, value: (R, key heads, K, D), where key heads divide heads (grouped-query attention).
        mask: (R or 1, 1, Q, K) bool, true where a query sees a key; None for causal attention, which needs Q = K.
        scaling: None for 1 / sqrt(D).
        softcap: None for no cap.
        dropout: probability with which a weight is dropped; with it the weights are kept for the backward pass.

    Returns:
        (R, heads, Q, D).
    """
    scaling = float(query.shape[-1] ** -0.5) if scaling is None else scaling
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    groups = query.shape[1] // key.shape[1]
    # The query heads of one key head become more queries of it: fewer and larger products, and no repeated keys.
    grouped = query.unflatten(1, (-1, groups)).flatten(2, 3)
    if dropout:
        weights = F.dropout(_weights(grouped, key, mask, scaling, softcap)[0], dropout)
        output = weights @ value
    else:
        output = _Written.apply(grouped, key, value, mask, scaling, softcap)
    return output.unflatten(2, (groups, -1)).flatten(1, 2)


class _Written(torch.autograd.Function):
    """`query` (R, H, G * Q, D), `key` and `value` (R, H, K, D), `seen` (R or 1, 1, Q, K)."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seen: Tensor,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, seen)
        ctx.options = scaling, softcap  # type: ignore[attr-defined]
        output = torch.empty_like(query)
        # Autocast would make the weights float32, only to round them for the next product.
        with torch.autocast(query.device.type, enabled=False):
            for rows in _row_chunks(query, key):
                weights, _ = _weights(query[rows], key[rows], _of_rows(seen, rows), scaling, softcap)
                output[rows] = weights @ value[rows]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, seen = ctx.saved_tensors  # type: ignore[attr-defined]
        scaling, softcap = ctx.options  # type: ignore[attr-defined]
        gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for rows in _row_chunks(query, key):
            weights, capped = _weights(query[rows], key[rows], _of_rows(seen, rows), scaling, softcap)
            gradients[2][rows] = weights.transpose(-1, -2) @ gradient[rows]
            of_weights = gradient[rows] @ value[rows].transpose(-1, -2)
            of_products = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            if capped is not None:
                of_products = of_products * (1 - (capped / softcap).square())
            of_products.mul_(scaling)
            gradients[0][rows] = of_products @ key[rows]
            gradients[1][rows] = of_products.transpose(-1, -2) @ query[rows]
        return *gradients, None, None, None


def _weights(
    query: Tensor, key: Tensor, seen: Tensor, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Attention weights (r, H, G * Q, K), and the capped products where there is a cap."""
    products = query @ key.transpose(-1, -2) * scaling
    capped = None
    if softcap is not None:
        products = capped = softcap * torch.tanh(products / softcap)
    # (r, H, G, Q, K): the mask is the same for all heads.
    by_group = products.unflatten(2, (-1, seen.shape[2]))
    masked = torch.where(seen[:, :, None], by_group, torch.finfo(products.dtype).min)
    return torch.softmax(masked.flatten(2, 3), dim=-1), capped


def _row_chunks(query: Tensor, key: Tensor) -> list[slice]:
    of_one_row = query.shape[1] * query.shape[2] * key.shape[2]
    count = max(1, _ELEMENTS.get(device_kind(query), _ELEMENTS["cuda"]) // max(of_one_row, 1))
    return [slice(start, start + count) for start in range(0, query.shape[0], count)]


def _of_rows(seen: Tensor, rows: slice) -> Tensor:
    return seen if seen.shape[0] == 1 else seen[rows]
