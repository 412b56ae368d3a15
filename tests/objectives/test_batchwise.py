"""The losses over all rows of a batch: contrastive and cka."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import build_tiny_model
from tiny_batches import collate, gradients, make_batch, make_examples, signal, supervise
from torch import Tensor

from pivotune.config.supervision import CkaConfig, ContrastiveConfig
from pivotune.models.architecture import find_architecture
from pivotune.models.taps import tap
from pivotune.objectives.cka import linear_cka
from pivotune.objectives.contrastive import Contrastive, info_nce
from pivotune.objectives.deep_supervision import DeepSupervisionLoss, deep_supervision_terms

LAYER = 2
YES = torch.tensor([True, True, True])


def supervision(kind: str, **options):
    section = {"contrastive": ContrastiveConfig, "cka": CkaConfig}[kind](**options)
    return supervise(thinking=signal(kind=kind, layer=LAYER)).model_copy(update={kind: section})


def pooled(model, examples, span: str = "query") -> tuple[Tensor, Tensor]:
    """Mean states of both sides after `LAYER` blocks, of the examples with an English side."""
    architecture, sides = find_architecture(model), ([], [])
    for example in examples:
        for found, side in zip(sides, (example.main, example.parallel), strict=True):
            if example.parallel is None:
                continue
            places = [*range(*side.query), *(range(side.answer, len(side.ids)) if span == "query+answer" else ())]
            with tap(architecture, [LAYER]) as taps:
                model(input_ids=torch.tensor(side.ids[None].tolist()), use_cache=False)
            found.append(taps.hidden_states[LAYER][0, places].mean(dim=0))
    return torch.stack(sides[0]), torch.stack(sides[1])


def cross_entropy(target: Tensor, english: Tensor, temperature: float) -> Tensor:
    similarity = torch.cosine_similarity(target[:, None], english[None], dim=-1) / temperature
    return torch.nn.functional.cross_entropy(similarity, torch.arange(len(target)), reduction="sum")


def cka_of_features(one: Tensor, other: Tensor) -> Tensor:
    """Equation 4 of arXiv 1905.00414 as it is written, over widths in place of rows."""
    x, y = one - one.mean(dim=0), other - other.mean(dim=0)
    return (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


def test_info_nce_by_hand():
    target = torch.tensor([[1.0, 0], [0, 5], [1, 1]])
    english = torch.tensor([[3.0, 0], [0, 2], [1, 0]])
    losses = info_nce(target, english, YES, YES, temperature=0.5)
    root = 1 / math.sqrt(2)
    by_hand = [
        math.log(2 * math.e**2 + 1) - 2,  # similarities 1, 0, 1
        math.log(math.e**2 + 2) - 2,  # 0, 1, 0
        math.log(3 * math.exp(2 * root)) - 2 * root,  # 0.71 each
    ]
    assert losses.tolist() == pytest.approx(by_hand, abs=1e-6)
    # A row that does not count is no negative either.
    counted = torch.tensor([True, True, False])
    assert info_nce(target, english, counted, counted, 0.5).tolist() == pytest.approx(
        [math.log(math.e**2 + 1) - 2, math.log(math.e**2 + 1) - 2, 0], abs=1e-6
    )


def test_linear_cka_by_hand():
    one = torch.tensor([[1.0, 0], [-1, 0], [0, 0]])
    other = torch.tensor([[0.0, 2, 0], [0, 0, 2], [1, 1, 1]])
    # Centred: the Gram matrices are [[1, -1, 0], [-1, 1, 0], [0, 0, 0]] and, times 9, [[26, -10, ...], [-10, 26, ...]].
    assert float(linear_cka(one, other, YES)) == pytest.approx(float(cka_of_features(one, other)), abs=1e-6)
    assert float(linear_cka(one, one @ torch.tensor([[0.0, 3], [-3, 0]]), YES)) == pytest.approx(
        1
    )  # rotated and scaled
    assert float(linear_cka(one + 5, other, YES)) == pytest.approx(float(linear_cka(one, other, YES)))
    left_out = torch.cat([other, torch.full((1, 3), 9.0)])
    kept = torch.tensor([True, True, True, False])
    assert float(linear_cka(torch.cat([one, one[:1]]), left_out, kept)) == pytest.approx(
        float(linear_cka(one, other, YES))
    )
    random = np.random.default_rng(0)
    large = [torch.from_numpy(random.normal(size=(40, 6))) for _ in range(2)]
    all_rows = torch.ones(40, dtype=torch.bool)
    assert float(linear_cka(large[0].float(), large[1].float(), all_rows)) == pytest.approx(
        float(cka_of_features(*large)), abs=1e-5
    )


@pytest.mark.parametrize("span", ["query", "query+answer"])
def test_terms_and_gradients_are_those_of_the_formulas(distinct_family, span):
    model, examples = build_tiny_model(distinct_family), make_examples(8)
    for kind, english in (("contrastive", "detached"), ("contrastive", "joint"), ("cka", "detached"), ("cka", "joint")):
        terms = deep_supervision_terms(model, collate(examples), supervision(kind, span=span, english=english))
        assert int(terms["thinking"].count) == 6
        target, other = pooled(model, examples, span)
        other = other if english == "joint" else other.detach()
        expected = (
            cross_entropy(target, other, 0.1) if kind == "contrastive" else 6 * (1 - cka_of_features(target, other))
        )
        assert terms["thinking"].sum.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
        actual, wanted = gradients(model, terms["thinking"].sum), gradients(model, expected)
        assert actual.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(actual[name], gradient, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("kind", ["contrastive", "cka"])
def test_batches_without_rows_to_compare(kind):
    model = build_tiny_model()
    replayed = [example for example in make_examples(8) if example.parallel is None]
    none = deep_supervision_terms(model, collate(replayed), supervision(kind))["thinking"]
    assert (none.sum.item(), int(none.count)) == (0, 0)
    one = deep_supervision_terms(model, make_batch(1), supervision(kind))["thinking"]
    assert (one.sum.item(), int(one.count)) == (pytest.approx(0, abs=1e-6), 1)
    assert all(gradient.isfinite().all() for gradient in gradients(model, one.sum).values())


def test_negatives_of_the_accumulation_window():
    """The second micro-batch has the English rows of the first as negatives; the next window has not."""
    model, examples = build_tiny_model(), make_examples(8, replay=False)
    losses = DeepSupervisionLoss(supervision("contrastive", temperature=0.3))
    batches = collate(examples[:3]), collate(examples[3:6])
    losses.terms(model, batches[0])
    second = losses.terms(model, batches[1])["thinking"].sum
    target, english = pooled(model, examples[:6])
    similarity = torch.cosine_similarity(target[3:, None], english[None], dim=-1) / 0.3
    expected = torch.nn.functional.cross_entropy(similarity, torch.arange(3, 6), reduction="sum")
    assert second.item() == pytest.approx(expected.item(), abs=1e-4)
    losses.start_window()
    alone = losses.terms(model, batches[1])["thinking"].sum
    assert alone.item() == pytest.approx(cross_entropy(target[3:], english[3:], 0.3).item(), abs=1e-4)


def test_each_loss_has_negatives_of_its_own():
    """Vectors of another layer say nothing about a row."""
    objective, vectors = Contrastive(ContrastiveConfig()), torch.eye(3)
    first = objective.row_losses("conversion", vectors, vectors, YES)
    torch.testing.assert_close(objective.row_losses("thinking", vectors, vectors, YES), first)
