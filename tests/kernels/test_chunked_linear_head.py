"""The chunked loss of a linear head against `F.linear` and `F.cross_entropy`."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pivotune.kernels import chunked_linear_head
from pivotune.kernels.chunked_linear_head import (
    LinearHead,
    even_chunks,
    linear_cross_entropies,
    linear_cross_entropy_sum,
    linear_label_scores,
    rows_per_chunk,
)

ROWS, WIDTH, VOCABULARY = 11, 8, 50
# One row at a time, a last chunk that is smaller, all at once; softmax of all rows of a chunk, or of two.
CHUNKS = [(1, 9), (4, 2), (5, 9), (11, 2), (100, 9)]


def problem(
    *, bias=False, softcap=None, dtype=torch.float32, rows=ROWS, scale=3.0
) -> tuple[Tensor, LinearHead, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, factor: float = 1.0) -> Tensor:
        return (factor * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()

    head = LinearHead(leaf(VOCABULARY, WIDTH), leaf(VOCABULARY) if bias else None, softcap)
    labels = torch.randint(VOCABULARY, (rows,), generator=generator)
    return leaf(rows, WIDTH, factor=scale), head, labels


def naive(states: Tensor, head: LinearHead, labels: Tensor) -> Tensor:
    logits = F.linear(states, head.weight, head.bias)
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels, reduction="none")


def leaves(states: Tensor, head: LinearHead) -> list[Tensor]:
    return [tensor for tensor in (states, head.weight, head.bias) if tensor is not None]


def difference(one: Tensor, other: Tensor) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


@pytest.fixture(params=CHUNKS, ids=str)
def chunks(request, monkeypatch):
    rows, softmax_rows = request.param
    monkeypatch.setattr(chunked_linear_head, "rows_per_chunk", lambda *_: rows)
    monkeypatch.setattr(chunked_linear_head, "_CPU_SOFTMAX", softmax_rows * VOCABULARY * 4)
    monkeypatch.setattr(chunked_linear_head, "_CPU_GRADIENT_PART", 7 * WIDTH * 2)


OPTIONS = [{}, {"softcap": 2.0}, {"bias": True}, {"bias": True, "softcap": 2.0}]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_frozen_head_equals_naive_row_by_row(chunks, options, dtype, tolerance):
    """With another upstream gradient for every row."""
    states, head, labels = problem(dtype=dtype, **options)
    upstream = torch.linspace(-1, 2, ROWS, dtype=dtype)
    expected = naive(states, head, labels)
    (gradient,) = torch.autograd.grad(expected @ upstream, states)
    losses = linear_cross_entropies(states, head, labels)
    assert losses.dtype == dtype
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
    (losses @ upstream).backward()
    assert difference(states.grad, gradient) < tolerance
    assert head.weight.grad is None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_trained_head_equals_naive(chunks, options, dtype, tolerance):
    states, head, labels = problem(dtype=dtype, **options)
    expected = naive(states, head, labels).sum()
    gradients = torch.autograd.grad(0.37 * expected, leaves(states, head))
    loss = linear_cross_entropy_sum(states, head, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    (0.37 * loss).backward()
    for tensor, gradient in zip(leaves(states, head), gradients, strict=True):
        assert difference(tensor.grad, gradient) < tolerance


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_half_precision_is_as_exact_as_naive(chunks, options, autocast):
    """Losses and gradients are no further from float64 than those of naive, and have the same dtypes."""
    states, head, labels = problem(dtype=torch.float32 if autocast else torch.bfloat16, **options)
    exact = problem(dtype=torch.float64, **options)
    if not autocast:
        exact = doubled(states, head, labels)
    results = {
        "exact": loss_and_gradients(naive, *exact),
        "naive": loss_and_gradients(naive, states, head, labels, autocast=autocast),
        "ours": loss_and_gradients(linear_cross_entropy_sum, states, head, labels, autocast=autocast),
    }
    assert [value.dtype for value in results["ours"]] == [value.dtype for value in results["naive"]]
    assert results["ours"][0].dtype == torch.float32
    for ours, other, truth in zip(results["ours"], results["naive"], results["exact"], strict=True):
        assert difference(ours, truth) < 1.2 * difference(other, truth) + 2e-3
        assert difference(ours, truth) < 0.03


def loss_and_gradients(loss_of, states, head, labels, *, autocast=False) -> list[Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = 0.37 * loss_of(states, head, labels).sum()
    return [loss, *torch.autograd.grad(loss, leaves(states, head))]


def doubled(states: Tensor, head: LinearHead, labels: Tensor) -> tuple[Tensor, LinearHead, Tensor]:
    def double(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_()

    bias = None if head.bias is None else double(head.bias)
    return double(states), LinearHead(double(head.weight), bias, head.softcap), labels


def test_frozen_head_in_half_precision_keeps_losses_in_float32():
    states, head, labels = problem(dtype=torch.bfloat16)
    losses = linear_cross_entropies(states, head, labels)
    exact = F.cross_entropy(F.linear(states, head.weight).double(), labels, reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-5)
    losses.sum().backward()
    assert states.grad.dtype == torch.bfloat16


def test_autocast_leaves_float64_alone():
    states, head, labels = problem(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = linear_cross_entropies(states, head, labels)
    torch.testing.assert_close(losses, naive(states, head, labels), rtol=1e-13, atol=1e-13)


class Calls(TorchDispatchMode):
    """Counts operators and remembers the largest result."""

    def __init__(self):
        super().__init__()
        self.count: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count[func._schema.name.removeprefix("aten::").rstrip("_")] += 1
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *(tensor.untyped_storage().nbytes() for tensor in tensors)])
        return result

    @property
    def products(self) -> int:
        return self.count["mm"] + self.count["addmm"]


@pytest.mark.parametrize(
    ("loss", "needs", "products"),
    [
        (linear_cross_entropies, "", 1),
        (linear_cross_entropies, "states weight", 2),
        (linear_cross_entropies, "weight", 1),
        (linear_cross_entropy_sum, "", 1),
        (linear_cross_entropy_sum, "states", 2),
        (linear_cross_entropy_sum, "weight", 2),
        (linear_cross_entropy_sum, "states weight", 3),
    ],
)
def test_only_wanted_products_are_computed(monkeypatch, loss, needs, products):
    """And all of them in the forward pass, for each of 3 chunks."""
    monkeypatch.setattr(chunked_linear_head, "rows_per_chunk", lambda *_: 4)
    states, head, labels = problem()
    states.requires_grad_("states" in needs)
    head.weight.requires_grad_("weight" in needs)
    with Calls() as forward:
        value = loss(states, head, labels).sum()
    assert forward.products == 3 * products
    if value.requires_grad:
        with Calls() as backward:
            value.backward()
        assert backward.products == 0
    with Calls() as scored, torch.no_grad():
        loss(states, head, labels)
    assert (scored.products, scored.count["scatter_add"]) == (3, 0)


@pytest.mark.parametrize("loss", [linear_cross_entropies, linear_cross_entropy_sum])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_nothing_larger_than_a_chunk_or_the_head_is_made_or_kept(monkeypatch, loss, softcap):
    monkeypatch.setattr(chunked_linear_head, "rows_per_chunk", lambda *_: 4)
    states, head, labels = problem(rows=40, softcap=softcap)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        with Calls() as forward:
            value = loss(states, head, labels).sum()
        with Calls() as backward:
            value.backward()
    assert max(forward.largest, backward.largest) == 4 * VOCABULARY * WIDTH  # bytes of the head
    assert max(kept, default=0) <= states.numel()


@pytest.mark.parametrize("loss", [linear_cross_entropies, linear_cross_entropy_sum])
def test_a_second_derivative_is_refused(loss):
    states, head, labels = problem()
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss(states, head, labels).sum(), states, create_graph=True)


def test_backward_twice():
    """The frozen head keeps its gradient, the trained head hands it over."""
    states, head, labels = problem()
    losses = linear_cross_entropies(states, head, labels)
    first, second = (torch.autograd.grad(losses.sum(), states, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    loss = linear_cross_entropy_sum(states, head, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


def test_two_losses_add_up_in_the_weight_gradient():
    """A gradient that is handed over must not be shared with the next one."""
    states, head, labels = problem()
    (expected,) = torch.autograd.grad(3 * naive(states, head, labels).sum(), head.weight)
    for factor in (1.0, 2.0):
        (factor * linear_cross_entropy_sum(states, head, labels)).backward()
    assert difference(head.weight.grad, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows(dtype):
    states, head, labels = problem(rows=0, bias=True, dtype=dtype)
    losses = linear_cross_entropies(states, head, labels)
    assert losses.shape == (0,)
    losses.sum().backward()
    loss = linear_cross_entropy_sum(states, head, labels)
    assert loss.item() == 0
    loss.backward()
    assert states.grad.shape == (0, WIDTH)
    assert not head.weight.grad.any()
    assert not head.bias.grad.any()
    assert linear_label_scores(states, head, labels).greedy.shape == (0,)


def test_a_label_whose_probability_underflows():
    """exp(-300) is no float32, its logarithm is."""
    head = LinearHead(torch.tensor([[0.0], [300.0], [299.0]]))
    losses = linear_cross_entropies(torch.ones(3, 1), head, torch.tensor([0, 1, 2]))
    assert losses.tolist() == pytest.approx([300.3132617, 0.3132617, 1.3132617], rel=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_label_scores(chunks, softcap):
    states, head, labels = problem(softcap=softcap, scale=0.3)
    best = F.linear(states, head.weight).argmax(dim=1)
    mixed = torch.where(torch.arange(ROWS) % 2 == 0, best, labels)
    scores = linear_label_scores(states, head, mixed)
    assert scores.greedy.tolist() == (best == mixed).tolist()
    assert 0 < scores.greedy.sum() < ROWS
    torch.testing.assert_close(scores.log_probabilities, -naive(states, head, mixed).detach(), rtol=1e-5, atol=1e-5)
    assert not scores.log_probabilities.requires_grad


def test_of_equally_probable_tokens_the_first_is_greedy():
    head = LinearHead(torch.zeros(3, 2))
    assert linear_label_scores(torch.ones(3, 2), head, torch.arange(3)).greedy.tolist() == [True, False, False]


@pytest.mark.parametrize("label", [-100, VOCABULARY])
def test_a_label_outside_the_vocabulary_is_refused(label):
    states, head, labels = problem()
    labels[3] = label
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropies(states, head, labels)


def test_even_chunks():
    assert [(part.start, part.stop) for part in even_chunks(10, 4)] == [(0, 3), (3, 6), (6, 10)]
    assert list(even_chunks(0, 4)) == []
    for count in range(1, 30):
        parts = list(even_chunks(count, 7))
        sizes = [part.stop - part.start for part in parts]
        assert sum(sizes) == count
        assert max(sizes) <= 7
        assert max(sizes) - min(sizes) <= 1
        assert len(parts) == -(-count // 7)


def test_rows_per_chunk():
    """48 MiB on a CPU and 256 MiB on a GPU, of float32 logits; never few enough to waste the matrix product."""
    assert [rows_per_chunk("cpu", size) for size in (49_152, 32_000, 256_000)] == [256, 393, 128]
    assert [rows_per_chunk("cuda", size) for size in (49_152, 32_000, 256_000)] == [1365, 2097, 262]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("autocast", [True, False])
def test_on_a_gpu(autocast):
    states, head, labels = problem(softcap=2.0, bias=True)
    on_gpu = LinearHead(head.weight.detach().cuda().requires_grad_(), head.bias.detach().cuda().requires_grad_(), 2.0)
    gpu_states = states.detach().cuda().requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy_sum(gpu_states, on_gpu, labels.cuda())
    loss.backward()
    naive(states, head, labels).sum().backward()
    for one, other in zip(leaves(gpu_states, on_gpu), leaves(states, head), strict=True):
        assert difference(one.grad.cpu(), other.grad) < (0.03 if autocast else 1e-4)
