from __future__ import annotations

import pytest
import torch
from conftest import NUM_LAYERS, VOCABULARY, build_tiny_model
from peak_bytes import peak
from tiny_training import make_pairs

from pivotune.config.settings import LoraSettings
from pivotune.config.supervision import TunedLensConfig
from pivotune.explore.grid import GridDifference, LensGrid, lens_grids, lens_states
from pivotune.lenses.logit import lens_logits
from pivotune.lenses.tuned import TunedLens
from pivotune.models.adapters import add_adapters, build_lora_config
from pivotune.models.architecture import find_architecture
from pivotune.models.taps import tap
from pivotune.training.lens_fitting import fit_all_layers

IDS = [7, 301, 12, 99, 45, 12, 380, 7, 66, 210, 31]
START = 3
LETTERS = (torch.arange(VOCABULARY) % 3 == 0, torch.arange(VOCABULARY - 4) % 3 == 1)  # fewer tokens than output rows


@torch.no_grad()
def naive(model, lens, ids=IDS, start=START) -> torch.Tensor:
    """Distributions of all layers and positions at once, (L + 1, N, V)."""
    architecture = find_architecture(model)
    with tap(architecture, range(NUM_LAYERS + 1)) as taps:
        model(input_ids=torch.tensor([ids]), use_cache=False)
    states = [taps.hidden_states[layer][0, start:] for layer in range(NUM_LAYERS + 1)]
    read = [lens(h, layer) if lens and layer < NUM_LAYERS else h for layer, h in enumerate(states)]
    return lens_logits(architecture, torch.stack(read)).softmax(-1)


def random_lens(model) -> TunedLens:
    """Maps that change every layer in another way."""
    architecture, lens = find_architecture(model), TunedLens(find_architecture(model))
    width = architecture.head_weight.shape[1]
    lens.maps = {k: (0.3 * torch.randn(width, width), torch.randn(width)) for k in range(architecture.num_layers)}
    return lens


def read(model, lens=None):
    return find_architecture(model), lens_states(model, IDS, lens, START)


def grid_of(model, lens=None) -> LensGrid:
    grids, difference = lens_grids([read(model, lens)], LETTERS)
    assert difference is None
    return grids[0]


@pytest.mark.parametrize("lens_name", ["logit", "tuned"])
def test_equals_lens_logits(family, lens_name):
    model = build_tiny_model(family)
    lens = random_lens(model) if lens_name == "tuned" else None
    p, grid = naive(model, lens), grid_of(model, lens)
    exact = {"rtol": 0, "atol": 1e-5}
    top = p.topk(10)
    torch.testing.assert_close(grid.probabilities, top.values, **exact)
    torch.testing.assert_close(p.gather(-1, grid.tokens), top.values, **exact)
    torch.testing.assert_close(grid.entropy, torch.special.entr(p).sum(-1), **exact)
    torch.testing.assert_close(
        grid.output, p.gather(-1, p[-1].argmax(-1).expand(NUM_LAYERS + 1, -1)[..., None])[..., 0], **exact
    )
    for kind, mask in enumerate(LETTERS):
        torch.testing.assert_close(grid.letters[..., kind], p[..., : len(mask)][..., mask].sum(-1), **exact)
    # The layers and the positions differ by more than the tolerance.
    assert (grid.entropy.diff(dim=0).abs().amax(1) > 2e-5).all()
    assert (grid.entropy.diff(dim=1).abs().amax(0) > 2e-5).all()


def test_last_layer_is_the_models_own_output(distinct_family):
    model = build_tiny_model(distinct_family)
    with torch.no_grad():
        output = model(input_ids=torch.tensor([IDS])).logits[0, START:].softmax(-1)
    grid = grid_of(model, random_lens(model))
    torch.testing.assert_close(grid.probabilities[-1], output.topk(10).values, rtol=0, atol=1e-5)
    torch.testing.assert_close(grid.output[-1], grid.probabilities[-1, :, 0], rtol=0, atol=0)


def test_a_fitted_lens_covers_every_layer():
    model = build_tiny_model()
    lens = fit_all_layers(model, make_pairs(30), TunedLensConfig(states=400))
    torch.testing.assert_close(grid_of(model, lens).entropy, torch.special.entr(naive(model, lens)).sum(-1))


def test_adapters_are_active():
    model = add_adapters(build_tiny_model(), build_lora_config(LoraSettings(r=4, dropout=0.0), build_tiny_model()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    entropy = grid_of(model).entropy
    torch.testing.assert_close(entropy, torch.special.entr(naive(model, None)).sum(-1))
    assert (entropy - grid_of(build_tiny_model()).entropy).abs().max() > 0.01


def difference(model, other) -> GridDifference:
    grids, found = lens_grids([read(model), read(other)], LETTERS)
    for each, grid in zip((model, other), grids, strict=True):
        # The grids are those of each model alone, whose positions are read in larger parts.
        for name, tensor in vars(grid_of(each)).items():
            torch.testing.assert_close(getattr(grid, name), tensor, rtol=1e-5, atol=1e-6)
    assert found is not None
    return found


def test_difference_is_the_kl_and_the_change_of_the_likeliest(distinct_family):
    model, other = build_tiny_model(distinct_family), build_tiny_model(distinct_family, seed=1)
    p, q, found = naive(model, None), naive(other, None), difference(model, other)
    torch.testing.assert_close(found.kl, (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-5)
    top = p.argmax(-1, keepdim=True)
    torch.testing.assert_close(found.change, (p.gather(-1, top) - q.gather(-1, top))[..., 0], rtol=0, atol=1e-5)


def test_kl_is_from_the_first_model_to_the_other():
    model, other = build_tiny_model(), build_tiny_model(seed=1)
    assert (difference(model, other).kl - difference(other, model).kl).abs().max() > 1e-3


def test_equal_models_do_not_differ():
    model = build_tiny_model()
    same = difference(model, model)
    assert same.kl.abs().max() < 1e-6
    assert same.change.abs().max() == 0


@pytest.mark.parametrize(
    ("family_name", "dtype"), [("llama", "float32"), ("llama", "bfloat16"), ("gemma2", "bfloat16")]
)
def test_memory_stays_below_one_layers_logits(family_name, dtype):
    """64 positions x 32 layers with the vocabulary of LLaMA-2: at once less than the float32 logits of one layer."""
    positions, vocabulary = 64, 32_000
    model = build_tiny_model(family_name, num_hidden_layers=1, vocab_size=vocabulary).to(getattr(torch, dtype))
    architecture = find_architecture(model)
    states = torch.randn(33, positions, 32).to(getattr(torch, dtype))
    letters = (torch.zeros(vocabulary, dtype=torch.bool), torch.ones(vocabulary, dtype=torch.bool))
    logits = positions * vocabulary * 4
    for count in (1, 2):
        assert peak(lambda: lens_grids([(architecture, states)] * count, letters)) < logits  # noqa: B023
