from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conftest import NUM_LAYERS, build_tiny_model, build_tiny_tokenizer
from tiny_training import make_pairs

from pivotune.config.supervision import SignalConfig, SupervisionConfig, TunedLensConfig
from pivotune.data.datasets import set_apart
from pivotune.layers.measure import analyze_layers
from pivotune.layers.reading import TOKENS_PER_ROW, LayerReading, measure_reading
from pivotune.layers.selection import select_by_reading
from pivotune.models.architecture import find_architecture
from pivotune.models.taps import tap
from pivotune.training.layer_choice import resolve_supervision
from pivotune.training.lens_fitting import fit_all_layers

PAIRS = make_pairs(8)


def test_nll_of_the_english_text_after_the_target_prompt(distinct_family):
    model = build_tiny_model(distinct_family)
    architecture = find_architecture(model)
    reading = measure_reading(model, PAIRS, lambda states, k: states + 0.1 * k, batch_size=3)
    for name, part in (("conversion", lambda side: side.ids[slice(*side.query)]),
                       ("thinking", lambda side: side.ids[side.answer :])):  # fmt: skip
        sums, count = torch.zeros(NUM_LAYERS + 1), 0
        for pair in PAIRS:
            prompt = pair.target.ids[: pair.target.answer]
            english = part(pair.english)[:TOKENS_PER_ROW]
            ids = torch.tensor([[*prompt.tolist(), *english.tolist()]])
            with torch.no_grad(), tap(architecture, range(NUM_LAYERS + 1)) as taps:
                model(input_ids=ids, use_cache=False)
            for k in range(NUM_LAYERS + 1):
                states = taps.hidden_states[k][0, len(prompt) - 1 : -1]
                states = states + 0.1 * k if k < NUM_LAYERS else states
                logits = architecture.transform_logits(architecture.lm_head(architecture.final_norm(states)))
                labels = torch.tensor(english.tolist())
                sums[k] += torch.nn.functional.cross_entropy(logits.detach(), labels, reduction="sum")
            count += len(english)
        assert reading.tokens[name] == count
        assert getattr(reading, name) == pytest.approx((sums / count).tolist(), rel=1e-4)


def curve(*values: float) -> list[float]:
    # Layers 0 and L are not choosable: the embeddings and the output.
    return [20.0, *values, 0.1]


@pytest.mark.parametrize(
    ("x_en", "y_en", "chosen"),
    [
        (curve(9, 7, 6.9, 6, 5, 4, 4), curve(9, 9, 8, 7, 5, 3, 3), (2, 5)),
        # Conversion too high and thinking too low: a tenth and two thirds of 8.
        (curve(9, 9, 9, 9, 9, 9, 8), curve(9, 5, 5, 5, 5, 5, 5), (1, 5)),
    ],
)
def test_layers_are_chosen_by_their_share_of_the_gain(x_en, y_en, chosen):
    found = select_by_reading(LayerReading(conversion=x_en, thinking=y_en, tokens={}))
    assert (found.conversion, found.thinking) == chosen
    assert found.method == "reading"
    assert "nats per token" in found.reason
    assert ("by its depth" in found.reason) is (chosen == (1, 5))


def test_a_model_that_says_nothing_gets_layers_by_depth():
    flat = [9.0] * 31
    found = select_by_reading(LayerReading(conversion=flat, thinking=flat, tokens={}))
    assert (found.conversion, found.thinking) == (3, 20)
    assert "no layer says the English text clearly better" in found.reason


def test_one_loss_keeps_its_own_part_of_the_reason():
    """Also after a round through `layers.json`; a named layer has a reason of its own."""
    reading = LayerReading(conversion=curve(9, 7, 6.9, 6, 5, 4, 4), thinking=curve(9, 9, 8, 7, 5, 3, 3), tokens={})
    found = select_by_reading(reading)
    assert found.reason == f"{found.reasons['conversion']}; {found.reasons['thinking']}"
    analysis: Any = json.loads(json.dumps(found.to_dict()))
    for layer, reason in (("auto", found.reasons["thinking"]), (6, "thinking layer 6 was asked for")):
        supervision = SupervisionConfig(thinking=SignalConfig(layer=layer))
        chosen = resolve_supervision(supervision, 8, analysis)[1]
        assert (chosen.thinking, chosen.reason, chosen.reasons) == (5 if layer == "auto" else 6, reason, {})


def test_the_analysis_holds_what_was_read():
    pairs, others = set_apart(make_pairs(48), 24, 400)
    assert len(others) == 24
    assert not {pair.number for pair in pairs} & {pair.number for pair in others}
    lens = fit_all_layers(build_tiny_model(), others, TunedLensConfig(states=400))
    analysis = analyze_layers(build_tiny_model(), build_tiny_tokenizer(), pairs, lens=lens, reading=True)
    assert analysis["lens"] == "tuned"
    assert analysis["method"] == "reading"
    assert len(analysis["reading"]["thinking"]) == NUM_LAYERS + 1
    raw = analyze_layers(build_tiny_model(), build_tiny_tokenizer(), pairs)
    assert raw["lens"] == "logit"
    assert raw["reading"] is None
    # The lens is not used at the output, where both are the model.
    assert analysis["target"]["entropy"][-1] == pytest.approx(raw["target"]["entropy"][-1])
    assert analysis["target"]["entropy"][1] != pytest.approx(raw["target"]["entropy"][1], rel=1e-6)
