from __future__ import annotations

from math import sqrt

import pytest
import torch
from conftest import NUM_LAYERS, build_tiny_model
from tiny_batches import gradients, make_batch, make_examples, signal, supervise
from torch import Tensor

from pivotune.config.supervision import SupervisionConfig
from pivotune.forward.passes import Passes, separate_passes
from pivotune.models.architecture import find_architecture
from pivotune.models.taps import Taps, tap
from pivotune.objectives.base import InnerLoss
from pivotune.objectives.cosine import Cosine, feature_loss, pool
from pivotune.objectives.deep_supervision import deep_supervision_terms

NO, YES = False, True


@pytest.fixture
def by_hand() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Three rows of width 2: an ordinary one, one whose sides point in opposite directions, a replay row."""
    batch = {
        "query_mask": torch.tensor([[NO, YES, YES, NO], [YES, NO, NO, NO], [YES, YES, NO, NO]]),
        "labels": torch.tensor([[-100, -100, -100, 7], [-100, 8, -100, -100], [-100, -100, 9, 9]]),
        "english_query_mask": torch.tensor([[YES, NO, NO], [YES, YES, NO], [NO, NO, NO]]),
        "english_answer_mask": torch.tensor([[NO, YES, YES], [NO, NO, YES], [NO, NO, NO]]),
    }
    target = torch.tensor(
        [[[9.0, 9], [2, 0], [0, 2], [0, 4]], [[3, 3], [5, 1], [9, 9], [9, 9]], [[1, 1], [1, 1], [1, 1], [1, 1]]]
    )
    english = torch.tensor([[[1.0, 0], [0, 1], [0, 3]], [[-1, -1], [-3, -3], [6, 8]], [[1, 2], [3, 4], [5, 6]]])
    return target, english, batch


# Row 1, mean of the query: (1, 1) against (1, 0); row 2: (3, 3) against (-2, -2).
# Row 1, mean of query and answer: (2/3, 2) against (1/3, 4/3); row 2: (4, 2) against (2/3, 4/3).
EXPECTED = {
    ("mean", "query"): (1 - 1 / sqrt(2)) + 2,
    ("last", "query"): 1 + 2,  # (0, 2) against (1, 0); (3, 3) against (-3, -3)
    ("mean", "query+answer"): (1 - (2 * 1 + 6 * 4) / (sqrt(40) * sqrt(17)))
    + (1 - (4 * 2 + 2 * 4) / (sqrt(20) * sqrt(20))),
    ("last", "query+answer"): 0 + (1 - (5 * 6 + 1 * 8) / (sqrt(26) * 10)),  # (0, 4), (0, 3); (5, 1), (6, 8)
}


@pytest.mark.parametrize(("pooling", "span"), list(EXPECTED))
def test_loss_worked_out_by_hand(by_hand, pooling, span):
    target, english, batch = by_hand
    term = feature_loss(target, english, batch, pooling=pooling, span=span)
    assert int(term.count) == 2
    assert term.sum.item() == pytest.approx(EXPECTED[pooling, span], abs=1e-6)


def test_scale_of_a_state_does_not_matter_but_its_direction_does(by_hand):
    target, english, batch = by_hand
    terms = [feature_loss(t, english, batch, pooling="mean", span="query").sum for t in (target, 7 * target, -target)]
    torch.testing.assert_close(terms[1], terms[0])
    assert terms[2].item() == pytest.approx(4 - terms[0].item())


def test_half_precision_states_are_pooled_in_float32(by_hand):
    target, english, batch = by_hand
    term = feature_loss(target.bfloat16(), english.bfloat16(), batch, pooling="mean", span="query+answer")
    assert term.sum.dtype == torch.float32
    assert term.sum.item() == pytest.approx(EXPECTED["mean", "query+answer"], abs=1e-6)


@pytest.mark.parametrize("empty", ["query_mask", "english_query_mask"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_row_with_an_empty_query_on_one_side_does_not_count(by_hand, empty, pooling):
    target, english, batch = by_hand
    target.requires_grad_()
    batch[empty][1] = False
    term = feature_loss(target, english, batch, pooling=pooling, span="query")
    expected = 1 - 1 / sqrt(2) if pooling == "mean" else 1
    assert (int(term.count), term.sum.item()) == (1, pytest.approx(expected, abs=1e-6))
    loss = InnerLoss("thinking", 3)
    assert int(Cosine(supervision(pooling=pooling).feature).count(loss, batch)) == 1
    term.sum.backward()
    assert target.grad[1:].abs().max() == 0


def test_pool_of_a_row_without_any_place():
    states = torch.ones(2, 3, 4)
    mask = torch.tensor([[NO, NO, NO], [NO, YES, NO]])
    assert pool(states, mask, "mean").tolist() == [[0.0] * 4, [1.0] * 4]


def test_last_is_the_last_true_place_also_with_gaps():
    states = torch.arange(5.0).view(1, 5, 1)
    assert pool(states, torch.tensor([[YES, NO, YES, NO, NO]]), "last").item() == 2


# --- which states are compared -------------------------------------------------------------------------------------

LAYERS = {"conversion": 2, "thinking": 3}


def supervision(**options) -> SupervisionConfig:
    return supervise(**{name: signal(kind="feature", layer=layer) for name, layer in LAYERS.items()}, **options)


def states_at(model, ids, layer: int | str) -> Tensor:
    """Of one unpadded row: `h_layer`, or the final-normed top for `final`."""
    architecture = find_architecture(model)
    layers = [] if layer == "final" else [layer]
    with tap(architecture, layers) as taps:
        model(input_ids=torch.tensor(ids[None].tolist()), use_cache=False)
    return (taps.final if layer == "final" else taps.hidden_states[layer])[0]


def naive_feature(model, english_model, name: str, english_layer: int | str, detach: bool) -> Tensor:
    """1 - cos of mean states over the query, row by row."""
    losses = []
    for example in make_examples(4):
        if example.parallel is None:
            continue
        main, english = example.main, example.parallel
        target = states_at(model, main.ids, LAYERS[name])[slice(*main.query)].mean(dim=0)
        other = states_at(english_model, english.ids, english_layer)[slice(*english.query)].mean(dim=0)
        other = other.detach() if detach else other
        losses.append(1 - (target @ other) / (target.norm() * other.norm()))
    return torch.stack(losses).sum()


@pytest.mark.parametrize("english_norm", ["final", "raw"])
def test_layers_that_are_compared(distinct_family, english_norm):
    """Conversion: both sides at layer i. Thinking: the target at j, English at the top, normed or raw."""
    model = build_tiny_model(distinct_family)
    terms = deep_supervision_terms(model, make_batch(4), supervision(english_norm=english_norm))
    english_layers = {
        "conversion": LAYERS["conversion"],
        "thinking": "final" if english_norm == "final" else NUM_LAYERS,
    }
    for name in LAYERS:
        expected = naive_feature(model, model, name, english_layers[name], True)
        assert terms[name].sum.item() == pytest.approx(expected.item(), abs=2e-5)
        assert int(terms[name].count) == 3


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("span", ["query", "query+answer"])
def test_options_of_pooling_and_span_are_used(pooling, span):
    model, config = build_tiny_model(), supervision(pooling=pooling, span=span)
    terms = deep_supervision_terms(model, make_batch(4), config)

    def pooled(side, layer: int | str) -> Tensor:
        places = [*range(*side.query), *(range(side.answer, len(side.ids)) if span == "query+answer" else ())]
        states = states_at(model, side.ids, layer)[places]
        return states.mean(dim=0) if pooling == "mean" else states[-1]

    for name, layer in (("conversion", LAYERS["conversion"]), ("thinking", "final")):
        sides = [(e.main, e.parallel) for e in make_examples(4) if e.parallel is not None]
        cosines = [
            torch.cosine_similarity(pooled(main, LAYERS[name]), pooled(english, layer), dim=0)
            for main, english in sides
        ]
        assert terms[name].sum.item() == pytest.approx(len(sides) - sum(cosines).item(), abs=2e-5)


@pytest.mark.parametrize("english", ["detached", "joint", "frozen"])
def test_gradient_equals_the_formulas(english):
    model, start = build_tiny_model(), build_tiny_model(seed=1)
    reference = start if english == "frozen" else None
    for name, english_layer in (("conversion", LAYERS["conversion"]), ("thinking", "final")):
        terms = deep_supervision_terms(model, make_batch(4), supervision(english=english), reference=reference)
        actual = gradients(model, terms[name].sum)
        expected = gradients(model, naive_feature(model, reference or model, name, english_layer, english != "joint"))
        # The final norm is frozen in inner losses.
        assert (expected.pop("model.norm.weight", None) is not None) == (english == "joint" and name == "thinking")
        assert actual.keys() == expected.keys()
        for parameter, gradient in expected.items():
            torch.testing.assert_close(actual[parameter], gradient, rtol=1e-4, atol=1e-5)
        # Detached, nothing above the supervised layer moves; joint, thinking pulls the whole English side.
        above = [key for key in actual if f"layers.{NUM_LAYERS - 1}." in key]
        assert bool(above) == (english == "joint" and name == "thinking")
    assert all(parameter.grad is None for parameter in start.parameters())


@pytest.mark.parametrize("english", ["detached", "joint", "frozen"])
def test_english_side_gets_a_gradient_only_when_joint(english):
    """Also if whoever runs the passes forgot to detach it."""
    model = build_tiny_model()
    leaves: list[Tensor] = []

    def run_passes(model, batch, request) -> Passes:
        passes = separate_passes(model, batch, request)
        states = {k: h.detach().requires_grad_() for k, h in passes.english.hidden_states.items()}
        final = passes.english.final.detach().requires_grad_()
        leaves.extend([states[LAYERS["conversion"]], states[NUM_LAYERS]])
        return Passes(main=passes.main, branches={}, english=Taps(hidden_states=states, final=final))

    terms = deep_supervision_terms(
        model, make_batch(4), supervision(english=english), reference=model, run_passes=run_passes
    )
    (terms["conversion"].sum + terms["thinking"].sum).backward()
    assert model.get_input_embeddings().weight.grad.abs().max() > 0
    for leaf in leaves:
        if english == "joint":
            assert leaf.grad.abs().max() > 0
        else:
            assert leaf.grad is None


def test_frozen_compares_with_the_reference_model():
    model, start = build_tiny_model(), build_tiny_model(seed=1)
    batch = make_batch(4)
    detached = deep_supervision_terms(model, batch, supervision())
    same = deep_supervision_terms(model, batch, supervision(english="frozen"), reference=build_tiny_model())
    other = deep_supervision_terms(model, batch, supervision(english="frozen"), reference=start)
    for name, english_layer in (("conversion", LAYERS["conversion"]), ("thinking", "final")):
        torch.testing.assert_close(same[name].sum, detached[name].sum)
        assert abs(other[name].sum.item() - detached[name].sum.item()) > 1e-2
        expected = naive_feature(model, start, name, english_layer, True)
        assert other[name].sum.item() == pytest.approx(expected.item(), abs=2e-5)


def test_reference_is_ignored_unless_frozen():
    model, batch = build_tiny_model(), make_batch(4)
    plain = deep_supervision_terms(model, batch, supervision())
    given = deep_supervision_terms(model, batch, supervision(), reference=build_tiny_model(seed=1))
    assert torch.equal(plain["thinking"].sum, given["thinking"].sum)


def test_frozen_needs_the_reference():
    with pytest.raises(ValueError, match="needs the starting model as `reference`, or its vectors in the batch"):
        deep_supervision_terms(build_tiny_model(), make_batch(2), supervision(english="frozen"))
