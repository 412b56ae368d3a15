"""Attention of a packed batch: every segment to its own rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pivotune.forward.shared.eager_chunked_attention import written_attention
from pivotune.forward.shared.packing import Packing
from pivotune.forward.shared.scatter import give, take
from pivotune.models.device_kind import device_kind

# Up to this many keys products in bfloat16 on a CPU beat the fused kernel; beyond, its skipping of what no query sees wins.
LONGEST_WRITTEN = 640


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
    """Attention of every segment to its own rows.

    Args:
        query: (1, heads, N, head size), with rotary positions applied; `key` and `value` (1, key heads, N, head size),
            where key heads divide heads (grouped-query attention).
        scaling: of the products; None for 1 / sqrt(head size).
        window: sliding window, in tokens, itself included.
        softcap: c of `c * tanh(products / c)` before the softmax (Gemma-2).

    Returns:
        (1, N, heads, head size).
    """
    # Under autocast rotary embeddings leave queries and keys in float32; attention would round them anyway.
    tokens = [states.to(value.dtype).transpose(1, 2)[0] for states in (query, key, value)]
    outputs = []
    for segment in packing.present(query.shape[2]):
        places = (segment.queries, segment.keys, segment.keys)
        rows = (take(states, scatter).transpose(1, 2) for states, scatter in zip(tokens, places, strict=True))
        queries, keys, values = rows
        written = softcap is not None or _slow_when_fused(queries, keys, dropout)
        mask = segment.mask(window, explicit=written)
        if written:
            attended = written_attention(
                queries, keys, values, mask=mask, scaling=scaling, softcap=softcap, dropout=dropout
            )
        else:
            attended = _fused_attention(queries, keys, values, mask, scaling, dropout)
        outputs.append(give(attended.transpose(1, 2), segment.queries))
    return torch.cat(outputs)[None] if len(outputs) > 1 else outputs[0][None]


def _slow_when_fused(query: Tensor, key: Tensor, dropout: float) -> bool:
    in_half_on_cpu = query.dtype == torch.bfloat16 and device_kind(query) == "cpu"
    return in_half_on_cpu and key.shape[2] <= LONGEST_WRITTEN and not dropout


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dropout: float
) -> Tensor:
    # Without a mask every fast kernel applies; with one, those of CUDA want the key heads repeated.
    grouped = query.shape[1] != key.shape[1]
    if grouped and mask is not None and device_kind(query) == "cuda":
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )
