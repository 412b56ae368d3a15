from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NUM_LAYERS, VOCABULARY, build_tiny_model
from tiny_training import make_pairs

from pivotune.config.supervision import TunedLensConfig
from pivotune.errors import UsageError
from pivotune.lenses import tuned
from pivotune.lenses.tuned import Text, TunedLens, fit_tuned_lens
from pivotune.models.architecture import find_architecture
from pivotune.models.taps import tap
from pivotune.training.lens_fitting import fit_all_layers

CONFIG = TunedLensConfig(states=4000, steps=20)
LAYERS = [1, 3]


def texts(count: int = 300, seed: int = 0) -> list[Text]:
    random = np.random.default_rng(seed)
    return [Text(random.integers(3, VOCABULARY, random.integers(8, 30)).astype(np.int32), 1) for _ in range(count)]


def states_of(model, text: Text) -> dict[int, torch.Tensor]:
    with torch.no_grad(), tap(find_architecture(model), range(NUM_LAYERS + 1)) as taps:
        model(input_ids=torch.from_numpy(text.ids.astype(np.int64))[None], use_cache=False)
    return {layer: states[0, text.first :] for layer, states in taps.hidden_states.items()}


def mean_kl(model, lens, layer: int, fresh: list[Text]) -> float:
    """KL(p_L || p_k) written out with the model's own modules."""
    architecture, total, count = find_architecture(model), 0.0, 0
    for states in (states_of(model, text) for text in fresh):
        logits = [
            architecture.transform_logits(architecture.lm_head(architecture.final_norm(read)))
            for read in (states[layer] if lens is None else lens(states[layer], layer), states[NUM_LAYERS])
        ]
        found, wanted = (each.detach().log_softmax(-1) for each in logits)
        total += (wanted.exp() * (wanted - found)).sum().item()
        count += len(wanted)
    return total / count


def test_fit_comes_nearer_to_the_output_on_other_texts(distinct_family):
    """The output of a random model follows its states: both lenses are far from uniform, the tuned one is nearer."""
    model = build_tiny_model(distinct_family)
    lens, figures = fit_tuned_lens(model, texts(), LAYERS, CONFIG)
    fresh = texts(10, seed=1)
    for layer in LAYERS:
        found, raw = mean_kl(model, lens, layer, fresh), mean_kl(model, None, layer, fresh)
        assert found < 0.85 * raw
        assert figures[layer].kl == pytest.approx(found, rel=0.3)
        assert figures[layer].logit_kl == pytest.approx(raw, rel=0.3)
    assert not any(tensor.requires_grad for maps in lens.maps.values() for tensor in maps)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_regression_finds_an_affine_map():
    random = torch.Generator().manual_seed(0)
    states = torch.randn(4000, 6, generator=random)
    matrix, offset = torch.randn(6, 6, generator=random), torch.randn(6, generator=random)
    outputs = states + states @ matrix.T + offset
    found, found_offset = tuned._ridge(states, outputs)
    # The penalty of one hundredth of the variance shrinks it by as much.
    torch.testing.assert_close(found, matrix / 1.01, atol=0.02, rtol=0)
    torch.testing.assert_close(found_offset, offset, atol=0.05, rtol=0)


def test_adam_improves_on_the_regression():
    model = build_tiny_model()
    closed_form = fit_tuned_lens(model, texts(), LAYERS, CONFIG.model_copy(update={"steps": 0}))[1]
    refined = fit_tuned_lens(model, texts(), LAYERS, CONFIG.model_copy(update={"steps": 60}))[1]
    assert refined[1].kl < closed_form[1].kl


def test_adam_gains_as_much_under_autocast_as_in_float32(monkeypatch):
    """Steps of this size need the gradient at the changed maps: that at the first ones leads too far."""
    monkeypatch.setattr(tuned, "ADAM_LEARNING_RATE", 3e-2)
    model = build_tiny_model()
    kl = []
    for steps, bf16 in ((0, False), (60, False), (60, True)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            kl.append(fit_tuned_lens(model, texts(), LAYERS, CONFIG.model_copy(update={"steps": steps}))[1][1].kl)
    closed_form, in_float32, in_bfloat16 = kl
    assert closed_form - in_bfloat16 > 0.9 * (closed_form - in_float32)


def test_steps_that_make_it_worse_are_dropped(monkeypatch):
    model = build_tiny_model()
    closed_form = fit_tuned_lens(model, texts(), LAYERS, CONFIG.model_copy(update={"steps": 0}))
    monkeypatch.setattr(tuned, "ADAM_LEARNING_RATE", 10.0)
    found = fit_tuned_lens(model, texts(), LAYERS, CONFIG)
    assert found[1] == closed_form[1]
    assert all(torch.equal(found[0].maps[k][0], closed_form[0].maps[k][0]) for k in LAYERS)


def test_states_are_read_through_residual_maps_in_their_own_dtype():
    lens = TunedLens(find_architecture(build_tiny_model()))
    matrix, offset = torch.randn(4, 4), torch.randn(4)
    lens.maps[2] = (matrix, offset)
    states = torch.randn(3, 4)
    torch.testing.assert_close(lens(states, 2), states + states @ matrix.T + offset)
    half = lens(states.bfloat16(), 2)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(lens(states, 2), states + F.linear(states, matrix, offset))
    with pytest.raises(ValueError, match="no map for layer 1"):
        lens(states, 1)


def test_arrays_hold_the_maps():
    lens, _ = fit_tuned_lens(build_tiny_model(), texts(), LAYERS, CONFIG)
    other = TunedLens(find_architecture(build_tiny_model()))
    other.set_arrays(lens.to_arrays())
    assert list(other.maps) == LAYERS
    assert all(torch.equal(one, two) for k in LAYERS for one, two in zip(lens.maps[k], other.maps[k], strict=True))


def test_same_seed_same_lens_and_progress_reaches_its_end():
    seen: list[int] = []
    one, _ = fit_tuned_lens(build_tiny_model(), texts(), [1], CONFIG, seed=3, progress=seen.append)
    two, _ = fit_tuned_lens(build_tiny_model(), texts(), [1], CONFIG, seed=3)
    other, _ = fit_tuned_lens(build_tiny_model(), texts(), [1], CONFIG, seed=4)
    assert torch.equal(one.maps[1][0], two.maps[1][0])
    assert not torch.equal(one.maps[1][0], other.maps[1][0])
    assert seen == sorted(seen)
    assert seen[-1] == 100


@pytest.mark.parametrize(("steps", "expected"), [(0, 100), (60, 25)])
def test_progress_weighs_a_step_by_its_operations(steps, expected):
    """60 steps of 256 states through the head cost more than 4000 states through four small blocks."""
    seen: list[int] = []
    config = CONFIG.model_copy(update={"steps": steps})
    fit_tuned_lens(build_tiny_model(), texts(), [1], config, progress=seen.append)
    before = seen[-1 - steps]
    assert before == pytest.approx(expected, abs=2)
    assert np.diff(seen[-1 - steps :]).max(initial=0) <= 2


def test_a_lens_without_figures_has_the_same_maps(monkeypatch):
    config = CONFIG.model_copy(update={"steps": 0})
    expected, figures = fit_tuned_lens(build_tiny_model(), texts(), LAYERS, config)
    assert list(figures) == LAYERS
    monkeypatch.setattr(tuned, "_mean_kl", lambda *args: pytest.fail("measured"))
    found, none = fit_tuned_lens(build_tiny_model(), texts(), LAYERS, config, measured=False)
    assert none == {}
    assert all(torch.equal(one, two) for k in LAYERS for one, two in zip(found.maps[k], expected.maps[k], strict=True))


def test_a_single_long_text_is_enough():
    long = Text(np.random.default_rng(0).integers(3, VOCABULARY, 400).astype(np.int32), 1)
    figures = fit_tuned_lens(build_tiny_model(), [long], [1], CONFIG)[1]
    assert np.isfinite(figures[1].kl)
    assert figures[1].logit_kl > 0


def test_a_few_tokens_are_refused():
    with pytest.raises(UsageError, match="at least 100 are needed"):
        fit_tuned_lens(build_tiny_model(), texts(2), [1], CONFIG)


def test_a_lens_of_every_layer_computes_no_figures(monkeypatch):
    """They cost more than its regressions, and nobody reads them."""
    monkeypatch.setattr("pivotune.lenses.tuned._mean_kl", None)
    assert set(fit_all_layers(build_tiny_model(), make_pairs(30), TunedLensConfig(states=400)).maps) == set(
        range(NUM_LAYERS)
    )
