from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCABULARY, build_tiny_model
from tiny_batches import build_tied_pair, by_hand_logits, gradients, make_batch, relative_difference, supervise
from torch import nn

from pivotune.kernels import chunked_linear_head as head_sweep
from pivotune.kernels.cross_entropy import cross_entropies, cross_entropy_sum, score_labels, shifted
from pivotune.models.architecture import find_architecture
from pivotune.objectives.deep_supervision import deep_supervision_terms


def test_answer_loss_equals_the_models_own(family):
    """Soft-cap and logit scale included: the tiny models have ones that change the loss a lot."""
    model = build_tiny_model(family)
    batch = make_batch(4)
    term = deep_supervision_terms(model, batch, supervise())["tft"]
    with torch.no_grad():
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    assert int(term.count) == int((batch["labels"] >= 0).sum())
    assert term.sum.item() / int(term.count) == pytest.approx(output.loss.item(), rel=1e-5)


def states_and_labels(count: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    states = 3 * torch.randn(count, 32, generator=torch.Generator().manual_seed(0))
    return states.requires_grad_(), torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[2, 3, 100])
def rows(request, monkeypatch) -> int:
    """Rows of a chunk: uneven parts, an even cut with a rest, and all at once."""
    monkeypatch.setattr(head_sweep, "rows_per_chunk", lambda *_: request.param)
    return request.param


def test_every_row_and_its_gradient_equal_naive(family, rows):
    """Soft-cap and logit scale included, with another upstream gradient for every row."""
    model = build_tiny_model(family)
    architecture = find_architecture(model)
    states, labels = states_and_labels()
    upstream = torch.linspace(-1, 2, 7)
    naive = F.cross_entropy(by_hand_logits(model, architecture.lm_head, states), labels, reduction="none")
    (expected,) = torch.autograd.grad(naive @ upstream, states)
    losses = cross_entropies(architecture, states, labels)
    torch.testing.assert_close(losses, naive, rtol=1e-5, atol=1e-5)
    (losses @ upstream).backward()
    assert (states.grad - expected).norm() < 1e-5 * expected.norm()
    assert architecture.lm_head.weight.grad is None


def test_gradients_of_a_trained_head_equal_naive(family, rows):
    model = build_tiny_model(family)
    head = find_architecture(model).lm_head
    states, labels = states_and_labels()
    naive = 0.37 * F.cross_entropy(by_hand_logits(model, head, states), labels, reduction="sum")
    expected = torch.autograd.grad(naive, [states, head.weight])
    loss = 0.37 * cross_entropy_sum(find_architecture(model), states, labels, frozen_head=False)
    for found, gradient in zip(torch.autograd.grad(loss, [states, head.weight]), expected, strict=True):
        assert (found - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_all_parameters_get_the_gradient_of_the_models_own_loss(family, tied):
    """The embedding's too, which is the head where they are tied."""
    model = build_tied_pair(family)[0 if tied else 1]
    batch = make_batch(4)
    found = gradients(model, deep_supervision_terms(model, batch, supervise())["tft"].sum)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    own = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    assert relative_difference(found, gradients(model, own)) < 1e-5


def test_label_scores_of_every_family(family, rows):
    model = build_tiny_model(family)
    architecture = find_architecture(model)
    states, labels = states_and_labels()
    logits = by_hand_logits(model, architecture.lm_head, states).detach()
    labels[::2] = logits.argmax(dim=1)[::2]
    scores = score_labels(architecture, states, labels)
    assert scores.greedy.tolist() == (logits.argmax(dim=1) == labels).tolist()
    expected = logits.log_softmax(dim=1)[range(7), labels]
    torch.testing.assert_close(scores.log_probabilities, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", ["cohere", "llama"])
def test_a_head_with_a_bias(scale):
    """The logit scale applies to the bias as well."""
    model = build_tiny_model(scale)
    architecture = find_architecture(model)
    architecture.lm_head.bias = nn.Parameter(torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2)))
    states, labels = states_and_labels()
    leaves = [states, architecture.lm_head.weight, architecture.lm_head.bias]
    logits = architecture.logit_scale * F.linear(*leaves)
    naive = F.cross_entropy(logits, labels, reduction="sum")
    loss = cross_entropy_sum(architecture, states, labels, frozen_head=False)
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)
    for found, gradient in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(naive, leaves), strict=True):
        assert (found - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("frozen_head", [True, False])
def test_a_model_in_float64_stays_exact(frozen_head):
    architecture = find_architecture(build_tiny_model("gemma2").double())
    states, labels = states_and_labels()
    states = states.detach().double().requires_grad_()
    loss = cross_entropy_sum(architecture, states, labels, frozen_head=frozen_head)
    logits = architecture.transform_logits(F.linear(states, architecture.lm_head.weight))
    naive = F.cross_entropy(logits, labels, reduction="sum")
    assert loss.item() == pytest.approx(naive.item(), rel=1e-14)
    found, expected = (torch.autograd.grad(value, states)[0] for value in (loss, naive))
    assert (found - expected).norm() < 1e-13 * expected.norm()


@pytest.fixture
def one_process_group():
    """Sharded tensors need a process group; this one has a single member and no network."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("frozen_head", [True, False])
def test_a_sharded_head_is_gathered(one_process_group, frozen_head):
    """Under FSDP2 the weight is a DTensor, whose shards get the gradient."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    model = build_tiny_model()
    head = find_architecture(model).lm_head
    states, labels = states_and_labels()
    naive = F.cross_entropy(F.linear(states, head.weight), labels, reduction="sum")
    expected = torch.autograd.grad(naive, [states, head.weight])
    mesh = init_device_mesh("cpu", (1,))
    head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))
    loss = cross_entropy_sum(find_architecture(model), states, labels, frozen_head=frozen_head)
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)
    loss.backward()
    torch.testing.assert_close(states.grad, expected[0])
    if frozen_head:
        assert head.weight.grad is None
    else:
        assert isinstance(head.weight.grad, DTensor)
        torch.testing.assert_close(head.weight.grad.full_tensor(), expected[1])


@pytest.mark.parametrize("frozen_head", [True, False])
def test_sum_over_positions_equals_the_formula(family, frozen_head):
    model = build_tiny_model(family)
    architecture = find_architecture(model)
    states = 3 * torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(VOCABULARY, (7,), generator=torch.Generator().manual_seed(1))
    loss = cross_entropy_sum(architecture, states, labels, frozen_head=frozen_head)
    probabilities = by_hand_logits(model, architecture.lm_head, states).softmax(dim=-1)
    expected = -probabilities[range(7), labels].log().sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_frozen_head_passes_gradient_to_the_states_only(family):
    """The same gradient as a head that is not frozen gives them."""
    model = build_tiny_model(family)
    architecture = find_architecture(model)
    labels = torch.tensor([5, 6, 7])
    gradients = []
    for frozen in (True, False):
        states = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model.zero_grad()
        cross_entropy_sum(architecture, states, labels, frozen_head=frozen).backward()
        gradients.append(states.grad)
        reached = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
        assert len(reached) == (0 if frozen else 1)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_head_is_trainable_again_afterwards():
    architecture = find_architecture(build_tiny_model())
    cross_entropy_sum(architecture, torch.randn(1, 32), torch.tensor([1]), frozen_head=True)
    assert architecture.lm_head.weight.requires_grad
    loss = cross_entropy_sum(architecture, torch.randn(1, 32), torch.tensor([1]), frozen_head=False)
    loss.backward()
    assert architecture.lm_head.weight.grad is not None


@pytest.mark.parametrize("frozen_head", [True, False])
def test_no_labels_give_a_zero_that_can_be_differentiated(frozen_head):
    architecture = find_architecture(build_tiny_model())
    states = torch.randn(0, 32, requires_grad=True)
    loss = cross_entropy_sum(architecture, states, torch.zeros(0, dtype=torch.long), frozen_head=frozen_head)
    assert loss.item() == 0
    loss.backward()
    assert states.grad.shape == (0, 32)


def test_half_precision_loss_is_float32():
    architecture = find_architecture(build_tiny_model().bfloat16())
    states, labels = torch.randn(5, 32).bfloat16(), torch.arange(5)
    loss = cross_entropy_sum(architecture, states, labels, frozen_head=True)
    assert loss.dtype == torch.float32
    exact = torch.nn.functional.cross_entropy(architecture.lm_head(states).double(), labels, reduction="sum")
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_states_and_labels_must_match():
    architecture = find_architecture(build_tiny_model())
    wrong = torch.randn(4, 32), torch.tensor([1, 2, 3])
    for frozen_head in (True, False):
        with pytest.raises(ValueError, match=r"states of shape \(4, 32\) do not match labels of shape \(3,\)"):
            cross_entropy_sum(architecture, *wrong, frozen_head=frozen_head)
    for function in (cross_entropies, score_labels):
        with pytest.raises(ValueError, match="do not match"):
            function(architecture, *wrong)


def test_shifted_picks_the_position_before_each_label():
    states = torch.arange(8.0).view(2, 4, 1)
    labels = torch.tensor([[-100, -100, 7, 0], [9, 8, -100, -100]])
    picked, targets = shifted(states, labels)
    # The first token of a row is predicted by nothing; label 0 is a label.
    assert picked.flatten().tolist() == [1, 2, 4]
    assert targets.tolist() == [7, 0, 8]
