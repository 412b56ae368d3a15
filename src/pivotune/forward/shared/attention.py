"""Attention of a packed batch: every segment attends to its own rows, by torch's fused kernels or written out here.

`eager_chunked_attention` does the cases that the fused kernels do not (Gemma-2's soft-cap) or do slowly: in bfloat16 on a
CPU it takes 0.6 of their time for rows of 270 tokens, 0.4 for 150 (docs/performance.md). Like them it keeps nothing of
size queries x keys for the backward pass except the mask, which all blocks share; the weights are computed again.

Shapes: R rows, H heads, G query heads for each key head, Q queries, K keys, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pivotune.forward.shared.packing import Packing
from pivotune.models.sharding import device_kind

# Up to this many keys, products in bfloat16 on a CPU beat the fused kernel; beyond, its skipping of unseen keys wins.
LONGEST_EAGER = 640
# Products of some rows at a time: a few MiB stay in the cache of a CPU core, and no long sequence needs much memory.
_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**28}


def packed_attention(
    packing: Packing,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Let every segment of a packed batch attend to its own rows; return (1, N, H, D).

    Args:
        query: (1, H, N, D), with rotary positions applied; `key` and `value` (1, key heads, N, D), where the number of
            key heads divides H (grouped-query attention).
        scaling: of the products; None for 1 / sqrt(D).
        window: sliding window, in tokens, itself included.
        softcap: c of `c * tanh(products / c)` before the softmax (Gemma-2).
    """
    # Under autocast rotary embeddings leave queries and keys in float32; attention would round them anyway.
    tokens = [states.to(value.dtype).transpose(1, 2)[0] for states in (query, key, value)]
    outputs = []
    for segment in packing.present(query.shape[2]):
        maps = (segment.queries, segment.keys, segment.keys)
        queries, keys, values = (one.pad(states).transpose(1, 2) for states, one in zip(tokens, maps, strict=True))
        in_half_on_cpu = queries.dtype == torch.bfloat16 and device_kind(queries) == "cpu"
        fused_is_slow = in_half_on_cpu and keys.shape[2] <= LONGEST_EAGER and not dropout
        eager = softcap is not None or fused_is_slow
        mask = segment.mask(window, explicit=eager)
        options = {"mask": mask, "scaling": scaling, "dropout": dropout}
        if eager:
            attended = eager_chunked_attention(queries, keys, values, softcap=softcap, **options)
        else:
            attended = _fused_attention(queries, keys, values, **options)
        outputs.append(segment.queries.unpad(attended.transpose(1, 2)))
    return torch.cat(outputs)[None] if len(outputs) > 1 else outputs[0][None]


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dropout: float
) -> Tensor:
    # Without a mask every fast kernel applies; with one, those of CUDA need the key heads repeated.
    grouped = query.shape[1] != key.shape[1]
    if grouped and mask is not None and device_kind(query) == "cuda":
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )


def eager_chunked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute softmax(cap(scaling * query key^T)) value, with cap(z) = softcap * tanh(z / softcap), (R, heads, Q, D).

    The products are rounded to the dtype of the inputs, as in Transformers' eager attention; the softmax is in float32.

    Args:
        query: (R, heads, Q, D); `key` and `value` (R, H, K, D), where H divides heads (grouped-query attention).
        mask: (R or 1, 1, Q, K) bool, True if a query sees a key; None for causal attention, which needs Q = K.
        scaling: None for 1 / sqrt(D).
        dropout: probability of dropping a weight; if not 0, the weights are kept for the backward pass.
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
        output = _EagerChunked.apply(grouped, key, value, mask, scaling, softcap)
    return output.unflatten(2, (groups, -1)).flatten(1, 2)


class _EagerChunked(torch.autograd.Function):
    """`query` (R, H, G * Q, D), `key` and `value` (R, H, K, D), `seen` (R or 1, 1, Q, K)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float, softcap: float | None
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, seen)
        ctx.options = scaling, softcap
        output = torch.empty_like(query)
        # Autocast would make the weights float32, only to round them for the next product.
        with torch.autocast(query.device.type, enabled=False):
            for rows in _row_chunks(query, key):
                weights, _ = _weights(query[rows], key[rows], _of_rows(seen, rows), scaling, softcap)
                output[rows] = weights @ value[rows]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, seen = ctx.saved_tensors
        scaling, softcap = ctx.options
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
    """Return attention weights (r, H, G * Q, K), and the capped products; None without a cap."""
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
    count = max(1, _CHUNK_ELEMENTS.get(device_kind(query), _CHUNK_ELEMENTS["cuda"]) // max(of_one_row, 1))
    return [slice(start, start + count) for start in range(0, query.shape[0], count)]


def _of_rows(seen: Tensor, rows: slice) -> Tensor:
    return seen if seen.shape[0] == 1 else seen[rows]
