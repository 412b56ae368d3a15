from __future__ import annotations

from itertools import product

import pytest
import torch
from conftest import NUM_LAYERS, build_tiny_model
from tiny_batches import collate, make_batch, make_examples, signal, supervise, values

from pivotune.config.supervision import SupervisionConfig
from pivotune.forward.passes import Passes, PassRequest, separate_passes
from pivotune.models.architecture import find_architecture
from pivotune.objectives.deep_supervision import deep_supervision_terms, term_counts

KINDS = ("logits", "feature", "none")
BATCHES = {
    "mixed": make_batch(8),
    "parallel rows only": make_batch(8, replay=False),
    "one row": make_batch(1),
    "without English sides": make_batch(4, parallel=False),
    "replay rows only": collate([example for example in make_examples(8) if example.english_prompt]),
}


def supervision(conversion: str = "none", thinking: str = "none", **options) -> SupervisionConfig:
    return supervise(conversion=signal(kind=conversion, layer=1), thinking=signal(kind=thinking, layer=3), **options)


def recorded_request(config: SupervisionConfig, **options) -> PassRequest:
    requests = []

    def run_passes(model, batch, request) -> Passes:
        requests.append(request)
        return separate_passes(model, batch, request)

    deep_supervision_terms(build_tiny_model(), make_batch(2), config, run_passes=run_passes, **options)
    assert len(requests) == 1
    return requests[0]


@pytest.mark.parametrize(("conversion", "thinking"), list(product(KINDS, KINDS)))
def test_terms_are_those_that_are_on(conversion, thinking):
    config = supervision(conversion, thinking)
    expected = {"tft"} | {name for name, kind in (("conversion", conversion), ("thinking", thinking)) if kind != "none"}
    terms = deep_supervision_terms(build_tiny_model(), make_batch(2), config)
    assert set(terms) == expected
    assert set(config.active()) == expected - {"tft"}
    assert all(term.sum.ndim == 0 and term.sum.item() > 0 for term in terms.values())


@pytest.mark.parametrize(
    ("config", "main", "branches", "english"),
    [
        (supervision(), set(), {}, set()),
        (supervision("logits", "logits"), set(), {"conversion": (1, "query"), "thinking": (3, "answer")}, set()),
        (supervision("logits", "logits", logits_mode="positional"), {1, 3}, {}, set()),
        (supervision("feature", "feature"), {1, 3}, {}, {1, NUM_LAYERS}),
        (supervision("feature", "none"), {1}, {}, {1}),
        (supervision("none", "feature"), {3}, {}, {NUM_LAYERS}),
        (supervision("logits", "feature"), {3}, {"conversion": (1, "query")}, {NUM_LAYERS}),
        (supervision("feature", "logits", logits_mode="positional"), {1, 3}, {}, {1}),
    ],
)
def test_only_the_passes_that_are_needed_are_asked_for(config, main, branches, english):
    request = recorded_request(config)
    assert request.main_layers == main
    assert request.branches == branches
    assert request.english_layers == english
    assert not request.english_gradient
    assert request.reference is None


def test_english_option_decides_gradient_and_model():
    reference = build_tiny_model(seed=1)
    joint = recorded_request(supervision("feature", english="joint"), reference=reference)
    assert (joint.english_gradient, joint.reference) == (True, None)
    frozen = recorded_request(supervision("feature", english="frozen"), reference=reference)
    assert (frozen.english_gradient, frozen.reference) == (False, reference)


def test_skipped_losses_cost_no_pass():
    config = supervision("logits", "feature")
    assert recorded_request(config, skip=frozenset({"conversion", "thinking"})) == recorded_request(supervision())
    half = recorded_request(config, skip=frozenset({"thinking"}))
    assert half.branches == {"conversion": (1, "query")}
    assert half.english_layers == frozenset()
    terms = deep_supervision_terms(build_tiny_model(), make_batch(2), config, skip=frozenset({"thinking"}))
    assert set(terms) == {"tft", "conversion"}
    # A frozen copy is not needed for a loss that is left out.
    frozen = supervision("none", "feature", english="frozen")
    deep_supervision_terms(build_tiny_model(), make_batch(2), frozen, skip=frozenset({"thinking"}))


@pytest.mark.parametrize("name", list(BATCHES))
@pytest.mark.parametrize(("conversion", "thinking"), [("logits", "feature"), ("feature", "logits"), ("none", "none")])
@pytest.mark.parametrize("mode", ["autoregressive", "positional"])
@pytest.mark.parametrize("span", ["query", "query+answer"])
def test_counts_from_masks_equal_those_of_the_terms(name, conversion, thinking, mode, span):
    config = supervision(conversion, thinking, logits_mode=mode, span=span)
    terms = deep_supervision_terms(build_tiny_model(), BATCHES[name], config)
    counts = term_counts(BATCHES[name], config)
    assert {key: int(count) for key, count in counts.items()} == {key: int(t.count) for key, t in terms.items()}


def test_counts_worked_out_from_the_examples():
    examples = make_examples(8)
    deep = [example for example in examples if example.parallel is not None]
    queries, answers = (
        [(getattr(e.main, part), getattr(e.parallel, part)) for e in deep]
        for part in ("num_query_tokens", "num_answer_tokens")
    )
    tft = sum(example.main.num_answer_tokens for example in examples)
    batch = collate(examples)
    for options, expected in (
        ({"conversion": "logits", "thinking": "logits"}, (sum(e for _, e in queries), sum(e for _, e in answers))),
        ({"conversion": "logits", "thinking": "logits", "logits_mode": "positional"},
         (sum(map(min, queries)), sum(map(min, answers)))),
        ({"conversion": "feature", "thinking": "feature"}, (len(deep), len(deep))),
    ):  # fmt: skip
        counts = term_counts(batch, supervision(**options))
        assert (int(counts["tft"]), int(counts["conversion"]), int(counts["thinking"])) == (tft, *expected)


@pytest.mark.parametrize("mode", ["autoregressive", "positional"])
def test_token_0_is_counted_as_any_other(mode):
    batch, config = make_batch(4), supervision("logits", "logits", logits_mode=mode)
    zeros = {**batch, "labels": torch.where(batch["labels"] >= 0, 0, batch["labels"])}
    terms = deep_supervision_terms(build_tiny_model(), zeros, config)
    for name, count in term_counts(batch, config).items():
        assert int(count) == int(terms[name].count) == int(term_counts(zeros, config)[name])


@pytest.mark.parametrize("name", ["without English sides", "replay rows only"])
@pytest.mark.parametrize("kind", ["logits", "feature"])
@pytest.mark.parametrize("mode", ["autoregressive", "positional"])
def test_batch_without_english_has_zero_inner_losses_and_still_trains(name, kind, mode):
    model = build_tiny_model()
    terms = deep_supervision_terms(model, BATCHES[name], supervision(kind, kind, logits_mode=mode))
    assert values(terms)["conversion"] == (0.0, 0)
    assert values(terms)["thinking"] == (0.0, 0)
    sum(term.sum for term in terms.values()).backward()
    assert model.get_input_embeddings().weight.grad.abs().max() > 0


def test_wrapped_model_gives_the_same_terms():
    """Through the wrapper's own forward, with adapters active."""
    from peft import LoraConfig, get_peft_model

    config, batch = supervision("logits", "feature"), make_batch(4)
    plain = values(deep_supervision_terms(build_tiny_model(), batch, config))
    wrapped = get_peft_model(build_tiny_model(), LoraConfig(target_modules="all-linear", init_lora_weights=True))
    same = values(deep_supervision_terms(wrapped, batch, config))
    assert all(same[name] == pytest.approx(plain[name]) for name in plain)
    block = find_architecture(wrapped).blocks[0]
    with torch.no_grad():
        block.self_attn.q_proj.lora_B["default"].weight.fill_(0.3)
    changed = values(deep_supervision_terms(wrapped, batch, config))
    assert all(abs(changed[name][0] - plain[name][0]) > 1e-3 for name in plain)
