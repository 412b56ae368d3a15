"""Chunked eager attention against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pivotune.forward.shared import attention as module
from pivotune.forward.shared.attention import eager_chunked_attention

ROWS, HEADS, KEY_HEADS, QUERIES, KEYS, SIZE = 3, 6, 2, 5, 9, 4


def operands(dtype: torch.dtype = torch.float64, keys: int = KEYS) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (HEADS, QUERIES), (KEY_HEADS, keys), (KEY_HEADS, keys)
    return [torch.randn(ROWS, *shape, SIZE, dtype=dtype, requires_grad=True) for shape in shapes]


def some_mask() -> Tensor:
    mask = torch.rand(ROWS, 1, QUERIES, KEYS, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[..., 0] = True
    return mask


def by_hand(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float | None) -> Tensor:
    key, value = (states.repeat_interleave(HEADS // KEY_HEADS, dim=1) for states in (key, value))
    products = scaling * torch.einsum("rhqd,rhkd->rhqk", query, key)
    if softcap is not None:
        products = softcap * torch.tanh(products / softcap)
    return products.masked_fill(~mask, float("-inf")).softmax(-1) @ value


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("elements", [1, 2**20])
def test_values_and_gradients_equal_the_formula(monkeypatch, softcap, elements):
    """In one piece, and row by row."""
    monkeypatch.setitem(module._CHUNK_ELEMENTS, "cpu", elements)
    inputs, mask = operands(), some_mask()
    upstream = torch.randn(ROWS, HEADS, QUERIES, SIZE, dtype=torch.float64)
    expected = by_hand(*inputs, mask, 0.3, softcap)
    found = eager_chunked_attention(*inputs, mask=mask, scaling=0.3, softcap=softcap)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_without_a_mask_it_is_causal_and_scaled_as_torch_does():
    inputs = operands(keys=QUERIES)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(eager_chunked_attention(*inputs), expected)


def test_bfloat16_is_as_near_to_the_truth_as_torchs_kernel():
    exact = operands(torch.float32, keys=QUERIES)
    rounded = [states.detach().bfloat16() for states in exact]
    truth = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    fused = F.scaled_dot_product_attention(*rounded, is_causal=True, enable_gqa=True)
    found = eager_chunked_attention(*rounded)
    assert found.dtype == torch.bfloat16
    assert 0 < (found - truth).norm() < 2 * (fused - truth).norm()


def test_nothing_of_size_queries_by_keys_is_kept():
    kept = []
    inputs = operands()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        eager_chunked_attention(*inputs, mask=some_mask(), softcap=1.0)
    # Inputs, and the mask, which all heads and layers share.
    assert sorted(kept) == sorted([*(states.numel() for states in inputs), ROWS * QUERIES * KEYS])


def test_dropout_drops_weights_and_keeps_the_mean():
    inputs, mask = [states.detach() for states in operands()], some_mask()
    expected = eager_chunked_attention(*inputs, mask=mask, softcap=0.7)
    torch.manual_seed(0)
    drawn = torch.stack([eager_chunked_attention(*inputs, mask=mask, softcap=0.7, dropout=0.3) for _ in range(2000)])
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(drawn.mean(0), expected, atol=0.1, rtol=0)
    assert (drawn[0] - expected).abs().max() > 0.2
