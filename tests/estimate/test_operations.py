from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import build_tiny_model, tiny_config
from tiny_batches import make_examples, signal, supervise
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from pivotune.data.collator import DeepSupervisionCollator
from pivotune.estimate.operations import known_rate, measure_costs, row_operations
from pivotune.objectives.deep_supervision import deep_supervision_terms


def _addmm(total, left, right, **_):
    return 2 * left[0] * left[1] * right[1]


SUPERVISIONS = {
    "tft": supervise(),
    "logits": supervise(conversion=signal(kind="logits", layer=1), thinking=signal(kind="logits", layer=3)),
    "prompt": supervise(
        conversion=signal(kind="logits", layer=1), thinking=signal(kind="logits", layer=3), logits_gradient="prompt"
    ),
    "feature": supervise(conversion=signal(kind="feature", layer=1), thinking=signal(kind="feature", layer=3)),
    "batchwise": supervise(conversion=signal(kind="contrastive", layer=1), thinking=signal(kind="cka", layer=2)),
    "joint": supervise(thinking=signal(kind="feature", layer=3), english="joint"),
}


@pytest.mark.parametrize("name", SUPERVISIONS)
def test_products_are_those_that_torch_counts(name):
    """Attention left out: torch does not count the CPU's fused kernel."""
    supervision, examples = SUPERVISIONS[name], make_examples(8)
    model = build_tiny_model().train()
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm})
    with counter:
        terms = deep_supervision_terms(model, DeepSupervisionCollator(0)(examples), supervision)
        torch.stack([term.sum for term in terms.values()]).sum().backward()
    costs = replace(measure_costs(model, checkpointing=False, whole_squares=False), attention=0.0)
    estimated = sum(row_operations(example, costs, supervision) for example in examples)
    assert estimated == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_attention_grows_with_the_square_of_the_row():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    costs = measure_costs(model, checkpointing=False, whole_squares=False)
    # 7 products of half the pairs, 4 heads of 8.
    assert costs.attention == 7 * 32


def test_checkpoints_run_the_blocks_once_more():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    plain, again = (measure_costs(model, checkpointing=on, whole_squares=False) for on in (False, True))
    assert again.step == pytest.approx(4 / 3 * plain.step)


def test_known_devices_are_found_in_longer_names():
    assert known_rate("NVIDIA H100 80GB HBM3") == 989e12
    assert known_rate("NVIDIA H100 PCIe") == 756e12
    assert known_rate("NVIDIA L40S") == 362e12
    assert known_rate("some card") is None
