from __future__ import annotations

import pytest
import torch
from conftest import VOCABULARY, build_tiny_model
from tiny_batches import by_hand_logits, make_batch

from pivotune.model.architecture import find_architecture
from pivotune.objectives.cross_entropy import cross_entropy_sum, shifted
from pivotune.objectives.deep_supervision import Supervision, deep_supervision_terms


def test_answer_loss_equals_the_models_own(family):
    """Soft-cap and logit scale included: the tiny models have ones that change the loss a lot."""
    model = build_tiny_model(family)
    batch = make_batch(4)
    term = deep_supervision_terms(model, batch, Supervision())["tft"]
    with torch.no_grad():
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    assert int(term.count) == int((batch["labels"] >= 0).sum())
    assert term.sum.item() / int(term.count) == pytest.approx(output.loss.item(), rel=1e-5)


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
    with pytest.raises(ValueError, match=r"states of shape \(4, 32\) do not match labels of shape \(3,\)"):
        cross_entropy_sum(architecture, torch.randn(4, 32), torch.tensor([1, 2, 3]), frozen_head=True)


def test_shifted_picks_the_position_before_each_label():
    states = torch.arange(8.0).view(2, 4, 1)
    labels = torch.tensor([[-100, -100, 7, 0], [9, 8, -100, -100]])
    picked, targets = shifted(states, labels)
    # The first token of a row is predicted by nothing; label 0 is a label.
    assert picked.flatten().tolist() == [1, 2, 4]
    assert targets.tolist() == [7, 0, 8]
