"""Heads other than plain linear layers are called as modules, a chunk at a time."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCABULARY, build_tiny_model
from torch import Tensor, nn

from pivotune.kernels import cross_entropy
from pivotune.kernels.cross_entropy import cross_entropies, cross_entropy_sum, score_labels
from pivotune.models.architecture import Architecture, find_architecture

ROWS = 7


class RoundedLinear(nn.Linear):
    """Like a quantized layer: a subclass that computes with other numbers than those of its weight."""

    def forward(self, states: Tensor) -> Tensor:
        return F.linear(states, self.weight + ((32 * self.weight).round() / 32 - self.weight).detach())


def with_hook(model: nn.Module) -> nn.Module:
    model.lm_head.register_forward_hook(lambda module, args, output: 0.5 * output)
    return model


def with_forward(model: nn.Module) -> nn.Module:
    """As Accelerate's hooks do it."""
    plain = model.lm_head.forward
    model.lm_head.forward = lambda states: 0.5 * plain(states)
    return model


def quantized(model: nn.Module) -> nn.Module:
    rounded = RoundedLinear(32, VOCABULARY, bias=False)
    rounded.weight = model.lm_head.weight
    model.lm_head = rounded
    return model


def with_peft(model: nn.Module, **options) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    peft = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **options))
    assert isinstance(peft, nn.Module)
    return peft


def saved_by_peft(model: nn.Module) -> nn.Module:
    return with_peft(model, target_modules=["q_proj"], modules_to_save=["lm_head"])


def with_adapter(model: nn.Module) -> nn.Module:
    return with_peft(model, target_modules=["lm_head"])


HEADS = [with_hook, with_forward, quantized, saved_by_peft, with_adapter]


@pytest.fixture(params=HEADS, ids=lambda make: make.__name__)
def architecture(request, monkeypatch) -> Architecture:
    """With a soft-cap, in chunks of 3 rows; the route for linear layers must not be taken."""
    monkeypatch.setattr(cross_entropy, "rows_per_chunk", lambda *_: 3)
    for name in ("linear_cross_entropies", "linear_cross_entropy_sum", "linear_label_scores"):
        monkeypatch.setattr(cross_entropy, name, None)
    return find_architecture(request.param(build_tiny_model("gemma2", tie_word_embeddings=False)))


def problem() -> tuple[Tensor, Tensor]:
    states = torch.randn(ROWS, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return states, torch.randint(VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(1))


def naive(architecture: Architecture, states: Tensor, labels: Tensor) -> Tensor:
    logits = architecture.transform_logits(architecture.lm_head(states))
    return F.cross_entropy(logits, labels, reduction="none")


def trained(architecture: Architecture) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in architecture.lm_head.named_parameters() if tensor.requires_grad}


def test_frozen_head(architecture):
    states, labels = problem()
    upstream = torch.linspace(-1, 2, ROWS)
    expected = naive(architecture, states, labels)
    (gradient,) = torch.autograd.grad(expected @ upstream, states)
    losses = cross_entropies(architecture, states, labels)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    (losses @ upstream).backward()
    assert (states.grad - gradient).norm() < 1e-5 * gradient.norm()
    assert all(parameter.grad is None for parameter in architecture.lm_head.parameters())


def test_trained_head(architecture):
    """All its trained parameters get their gradients: the weight, the saved copy or the adapters."""
    states, labels = problem()
    parameters = trained(architecture)
    expected = torch.autograd.grad(0.37 * naive(architecture, states, labels).sum(), [states, *parameters.values()])
    loss = cross_entropy_sum(architecture, states, labels, frozen_head=False)
    found = torch.autograd.grad(0.37 * loss, [states, *parameters.values()])
    assert parameters
    for one, other in zip(found, expected, strict=True):
        assert other.norm() > 0
        assert (one - other).norm() < 1e-5 * other.norm()


def test_a_head_that_trains_nothing_is_not_computed_twice(architecture):
    architecture.lm_head.requires_grad_(False)
    states, labels = problem()
    (expected,) = torch.autograd.grad(naive(architecture, states, labels).sum(), states)
    calls = count_rows(architecture)
    loss = cross_entropy_sum(architecture, states, labels, frozen_head=False)
    loss.backward()
    assert sum(calls) == ROWS
    torch.testing.assert_close(states.grad, expected)


def count_rows(architecture: Architecture) -> list[int]:
    calls: list[int] = []
    architecture.lm_head.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    return calls


def test_no_call_is_larger_than_a_chunk(architecture):
    states, labels = problem()
    calls = count_rows(architecture)
    cross_entropies(architecture, states, labels).sum().backward()
    assert calls == [2, 2, 3]
    cross_entropy_sum(architecture, states, labels, frozen_head=False).backward()
    with torch.no_grad():
        cross_entropies(architecture, states, labels)
        cross_entropy_sum(architecture, states, labels, frozen_head=False)
    score_labels(architecture, states, labels)
    assert max(calls) == 3
    # Once each, and once more to differentiate the trained head.
    assert sum(calls) == 6 * ROWS


def test_scores(architecture):
    states, labels = problem()
    logits = architecture.transform_logits(architecture.lm_head(states)).detach()
    labels[::2] = logits.argmax(dim=1)[::2]
    scores = score_labels(architecture, states, labels)
    assert scores.greedy.tolist() == (logits.argmax(dim=1) == labels).tolist()
    expected = logits.log_softmax(dim=1)[range(ROWS), labels]
    torch.testing.assert_close(scores.log_probabilities, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropies(architecture, states, labels), -expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen_head", [True, False])
def test_no_rows(architecture, frozen_head):
    states = torch.zeros(0, 32, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.long)
    loss = cross_entropy_sum(architecture, states, labels, frozen_head=frozen_head)
    assert loss.item() == 0
    loss.backward()
    assert states.grad.shape == (0, 32)
    with torch.no_grad():
        assert cross_entropies(architecture, states, labels).shape == (0,)
    assert score_labels(architecture, states, labels).log_probabilities.shape == (0,)


def test_a_second_derivative_of_the_frozen_head_is_refused(architecture):
    states, labels = problem()
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(cross_entropies(architecture, states, labels).sum(), states, create_graph=True)


def test_losses_of_a_head_in_half_precision_are_float32():
    model = with_hook(build_tiny_model().bfloat16())
    states, labels = problem()
    half = states.detach().bfloat16().requires_grad_()
    losses = cross_entropies(find_architecture(model), half, labels)
    exact = F.cross_entropy(model.lm_head(half).double(), labels, reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_partitioned_head_is_gathered_by_its_own_hooks():
    """ZeRO-3 leaves an empty weight outside the module's forward, which fetches it."""
    model = build_tiny_model()
    whole = copy.deepcopy(model.lm_head)
    states, labels = problem()
    expected = F.cross_entropy(whole(states), labels, reduction="none")
    model.lm_head.weight = nn.Parameter(torch.empty(0))
    model.lm_head.register_forward_pre_hook(lambda module, args: setattr(module.weight, "data", whole.weight.data))
    model.lm_head.register_forward_hook(lambda module, args, output: setattr(module.weight, "data", torch.empty(0)))
    with torch.no_grad():
        losses = cross_entropies(find_architecture(model), states, labels)
    torch.testing.assert_close(losses, expected)
    assert model.lm_head.weight.numel() == 0
