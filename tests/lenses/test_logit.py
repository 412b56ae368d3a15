from __future__ import annotations

import pytest
import torch
from conftest import NUM_LAYERS, VOCABULARY, build_tiny_model

from pivotune.lenses.logit import check_lens, lens_logits
from pivotune.models.architecture import find_architecture
from pivotune.models.taps import tap, truncated


def _tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def test_lens_at_the_last_layer_is_the_model(family):
    model = build_tiny_model(family)
    assert check_lens(model, _tokens()) < 1e-5


def test_inner_lens_differs_from_output(family):
    """A lens that ignored its input, or read the wrong layer, would agree."""
    model = build_tiny_model(family)
    architecture = find_architecture(model)
    with torch.no_grad(), tap(architecture, range(NUM_LAYERS + 1)) as taps:
        logits = model(input_ids=_tokens(), use_cache=False).logits
    for layer in range(NUM_LAYERS):
        lens = lens_logits(architecture, taps.hidden_states[layer])
        assert (lens - logits).abs().max() > 1e-2


def test_taps_follow_hugging_face_hidden_states(family):
    model = build_tiny_model(family)
    architecture = find_architecture(model)
    with torch.no_grad(), tap(architecture, range(NUM_LAYERS + 1)) as taps:
        output = model(input_ids=_tokens(), use_cache=False, output_hidden_states=True)
    for layer in range(NUM_LAYERS):
        torch.testing.assert_close(taps.hidden_states[layer], output.hidden_states[layer])
    torch.testing.assert_close(taps.final, output.hidden_states[NUM_LAYERS])


def test_softcap_and_scale_change_the_lens():
    capped = find_architecture(build_tiny_model("gemma2"))
    assert capped.softcap == 0.5
    assert capped.transform_logits(torch.tensor([100.0])).item() == pytest.approx(0.5)
    assert find_architecture(build_tiny_model("cohere")).logit_scale == 0.25
    assert find_architecture(build_tiny_model("granite")).logit_scale == 0.25
    assert find_architecture(build_tiny_model("llama")).softcap is None


def test_truncated_pass_equals_tap_of_full_pass(family):
    model = build_tiny_model(family)
    architecture = find_architecture(model)
    with torch.no_grad():
        with tap(architecture, [2]) as full:
            model(input_ids=_tokens(), use_cache=False)
        with truncated(architecture, 2), tap(architecture, [2]) as short:
            assert architecture.num_layers == 2
            model(input_ids=_tokens(), use_cache=False, logits_to_keep=1)
    assert architecture.num_layers == NUM_LAYERS
    torch.testing.assert_close(short.hidden_states[2], full.hidden_states[2], rtol=0, atol=0)


def test_lens_gives_no_gradient_to_norm_or_head(family):
    model = build_tiny_model(family)
    architecture = find_architecture(model)
    hidden = torch.randn(1, 3, 32, requires_grad=True)
    lens_logits(architecture, hidden).square().sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def _hook_count(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_and_truncation_are_gone_after_an_exception(distinct_family):
    model = build_tiny_model(distinct_family)
    architecture = find_architecture(model)
    before = _hook_count(model)
    with pytest.raises(RuntimeError, match="stop"), truncated(architecture, 1), tap(architecture, [0, 1]):  # noqa: PT012
        assert _hook_count(model) > before
        raise RuntimeError("stop")
    assert _hook_count(model) == before
    assert architecture.num_layers == NUM_LAYERS


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_tap_under_activation_checkpointing_keeps_gradients(distinct_family, use_reentrant):
    model = build_tiny_model(distinct_family).train()
    architecture = find_architecture(model)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        with tap(architecture, [2]) as taps:
            model(input_ids=_tokens(), use_cache=False)
        # Reading the tap after the backward pass would show a second firing.
        state = taps.hidden_states[2]
        state.square().mean().backward()
        assert taps.hidden_states[2] is state
        return torch.cat([p.grad.flatten() for p in architecture.blocks[:2].parameters() if p.grad is not None])

    plain = gradient()
    # transformers renamed the method; the old name warns from 5.2x on and goes with v6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    torch.testing.assert_close(gradient(), plain)
