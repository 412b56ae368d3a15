"""The dry step against real ones: what it counts is what tensors of a real step take."""

from __future__ import annotations

import pytest
import torch
from conftest import build_tiny_model, tiny_config
from tiny_batches import make_examples, signal, supervise
from torch import nn
from transformers import AutoModelForCausalLM

from pivotune.config.supervision import SupervisionConfig
from pivotune.data.collator import DeepSupervisionCollator
from pivotune.estimate import dry_step as module
from pivotune.estimate.dry_step import dry_step
from pivotune.objectives.deep_supervision import deep_supervision_terms

LOGITS = supervise(conversion=signal(kind="logits", layer=1), thinking=signal(kind="logits", layer=3))
FEATURE = supervise(
    conversion=signal(kind="feature", layer=1), thinking=signal(kind="feature", layer=3), english="joint"
)


def meta(family: str = "llama", **changes) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family, **changes))


def batch(count: int = 8):
    return DeepSupervisionCollator(0)(make_examples(count))


def run_dry(model: nn.Module, tensors, supervision: SupervisionConfig, **settings):
    return dry_step(model, tensors, supervision, **{"device": "cpu", "autocast": False, **settings})


def saved_bytes(model: nn.Module, supervision: SupervisionConfig) -> int:
    """What autograd keeps of a real forward pass, parameters left out, each storage once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = deep_supervision_terms(model.train(), batch(), supervision)
    assert terms
    return sum(kept.values())


def test_every_family_runs_dry(distinct_family):
    """Forward and backward, and at least what a real forward pass keeps for its backward is counted."""
    timeline = run_dry(meta(distinct_family), batch(), LOGITS)
    model = build_tiny_model(distinct_family)
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if not _is_unused(p, model, distinct_family))
    kept = saved_bytes(model, LOGITS)
    activations = timeline.peak(gradients=0)
    assert kept < activations < 1.5 * kept + 0.3e6
    # At the end the gradients are left, and little else.
    left = sum(deltas.sum(axis=0) for _, deltas in timeline.parts)
    assert left[1] == pytest.approx(weights, rel=0.01)
    assert abs(left[0]) < 0.05 * activations


def _is_unused(parameter: nn.Parameter, model: nn.Module, family: str) -> bool:
    """The vision tower of a multimodal model gets no gradient."""
    return family == "gemma3" and any(
        parameter is item for name, item in model.named_parameters() if "vision" in name or "projector" in name
    )


@pytest.mark.parametrize(
    ("supervision", "changes"),
    [(LOGITS, {"autocast": True, "checkpointing": True}), (FEATURE, {}), (supervise(), {})],
    ids=["logits, checkpoints", "feature", "tft"],
)
def test_repeated_blocks_equal_all_blocks(monkeypatch, supervision, changes):
    """Two blocks of each kind, the second repeated, give the timeline of the whole model."""
    inner = {
        name: signal(kind=term.signal, layer={1: 1, 3: 4}[term.layer]) for name, term in supervision.active().items()
    }
    deep = supervise(**inner, english=supervision.feature.english)
    cut = run_dry(meta(num_hidden_layers=8), batch(2), deep, **changes)
    monkeypatch.setattr(module, "_BLOCKS_KEPT", 99)
    whole = run_dry(meta(num_hidden_layers=8), batch(2), deep, **changes)
    for shares in ({}, {"gradients": 0}, {"gradients": 0.25, "weight_casts": 0}):
        assert cut.peak(**shares) == pytest.approx(whole.peak(**shares), rel=0.01)


def test_checkpoints_keep_less():
    plain, checkpointed = (run_dry(meta(), batch(), LOGITS, checkpointing=on) for on in (False, True))
    assert checkpointed.peak(gradients=0) < 0.6 * plain.peak(gradients=0)


def test_gradients_of_an_earlier_micro_batch_are_not_counted_again():
    """They are there from the start: the timeline holds what comes on top."""
    timeline = run_dry(meta(), batch(2), LOGITS, accumulated=True)
    assert timeline.peak() == timeline.peak(gradients=0)


def test_autocast_copies_of_weights_are_counted_apart():
    timeline = run_dry(meta(), batch(2), LOGITS, autocast=True)
    copies = timeline.peak() - timeline.peak(weight_casts=0)
    matrices = sum(p.numel() * 2 for p in build_tiny_model().parameters() if p.ndim == 2)
    assert 0.3 * matrices < copies <= matrices


def test_attention_of_a_gpu_is_assumed_where_the_estimate_is_for_one():
    """Its fused kernel keeps outputs that the CPU's chunked products in bfloat16 do not."""
    cpu, gpu = (run_dry(meta(), batch(), LOGITS, autocast=True, device=kind) for kind in ("cpu", "cuda"))
    assert cpu.peak(gradients=0) != gpu.peak(gradients=0)
