from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import build_tiny_model, tiny_config
from tiny_training import run_settings
from transformers.training_args import OptimizerNames

from pivotune.config.yaml_text import parse_config
from pivotune.estimate.dry_step import Timeline
from pivotune.estimate.memory import FOUR_BIT_BYTES, ModelSize, measure_model, memory_of, meta_model, optimizer_bytes


def sizes(folder, family="llama", *, optimizer="adamw_torch", **changes):
    config = parse_config({**run_settings(folder), **changes})
    model = meta_model(config, tiny_config(family))
    return measure_model(model, optimizer=optimizer, quantized=config.quantize is not None)


def test_parameters_are_those_of_the_model(distinct_family, tmp_path):
    model = build_tiny_model(distinct_family)
    size = sizes(tmp_path, distinct_family)
    assert size.total == size.trained == sum(parameter.numel() for parameter in model.parameters())
    assert size.trained_bytes == 4 * size.total


def test_tied_weights_count_once(tmp_path):
    config = parse_config(run_settings(tmp_path))
    tied, apart = (
        measure_model(
            meta_model(config, tiny_config("llama", tie_word_embeddings=tie)), optimizer="sgd", quantized=False
        )
        for tie in (True, False)
    )
    assert apart.total - tied.total == 384 * 32


def test_adapters_are_all_that_is_trained(tmp_path):
    size = sizes(tmp_path, lora={"r": 2})
    linear = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    assert size.trained == 4 * sum(2 * (rows + columns) for rows, columns in linear)
    assert size.optimizer_bytes == 8 * size.trained


def test_four_bit_base(tmp_path):
    """Matrices of the blocks take half a byte and their scales; embeddings and head stay as they are."""
    plain, packed = sizes(tmp_path, lora={"r": 2}), sizes(tmp_path, lora={"r": 2}, quantize="4bit")
    matrices = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert plain.frozen_bytes - packed.frozen_bytes == pytest.approx(matrices * (4 - FOUR_BIT_BYTES))
    assert packed.largest == 32 * 48


@pytest.mark.parametrize(
    ("name", "states"),
    [("adamw_torch", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("adagrad", torch.optim.Adagrad),
     ("rmsprop", torch.optim.RMSprop)],
)  # fmt: skip
def test_states_take_what_the_optimizer_allocates(name, states):
    model = build_tiny_model()
    optimizer = states(model.parameters(), lr=0.1)
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert optimizer_bytes(model, name) == sum(value.nbytes for value in tensors if value.ndim)


def test_adafactor_keeps_rows_and_columns():
    from transformers.optimization import Adafactor

    model = build_tiny_model()
    optimizer = Adafactor(model.parameters(), scale_parameter=False, relative_step=False, lr=0.1)
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert optimizer_bytes(model, "adafactor") == sum(value.nbytes for value in tensors if value.ndim)


def test_every_optimizer_has_a_size():
    model = build_tiny_model()
    whole = optimizer_bytes(model, "adamw_torch")
    for name in (each.value for each in OptimizerNames):
        assert 0 <= optimizer_bytes(model, name) <= 1.5 * whole


def test_eight_bit_states_leave_embeddings_and_small_tensors_alone():
    model = build_tiny_model(hidden_size=128, num_attention_heads=4, num_key_value_heads=4)
    saved = optimizer_bytes(model, "adamw_torch") - optimizer_bytes(model, "adamw_8bit")
    large = sum(p.numel() for name, p in model.named_parameters() if p.numel() >= 4096 and "embed" not in name)
    assert saved == pytest.approx(large * (8 - 2 * (1 + 4 / 256)))


# ---- memory of one device by strategy ----

SIZE = ModelSize(
    total=1000, trained=1000, frozen_bytes=0, trained_bytes=4000, optimizer_bytes=8000, block=100, outside=200,
)  # fmt: skip
# 500 bytes of activations and 2000 of weight copies, then 4000 of gradients while those go.
TIMELINE = Timeline(
    [("forward", np.array([[500.0, 0, 0], [0, 0, 2000]])), ("backward", np.array([[-500.0, 4000, 0], [0, 0, -2000]]))]
)


def memory(strategy, processes=1, **changes):
    options = {"compute_bytes": 2, "accumulated": False, "foreach_copies": False, **changes}
    return memory_of(SIZE, TIMELINE, strategy, processes=processes, **options)


def test_one_device():
    one = memory("single")
    assert (one.weights, one.gradients, one.optimizer, one.activations) == (4000, 4000, 8000, 2500)
    # Gradients grow while activations go: 4000 + 2000 at the worst, not the sum of all.
    assert one.peak == 4000 + 8000 + 6000


def test_gradients_are_there_from_the_start_under_accumulation():
    assert memory("single", accumulated=True).peak == 4000 + 8000 + 4000 + 2500


def test_ddp_copies_gradients_into_buckets():
    assert memory("ddp", 2).peak == memory("single").peak + 4000


def test_fsdp2_shares_everything_but_activations():
    """And needs no copies of weights for autocast: they come gathered in bfloat16."""
    four = memory("fsdp2", 4)
    assert (four.weights, four.gradients, four.optimizer, four.activations) == (1000, 1000, 2000, 500)
    assert four.communication == 2 * (2 * 200 + 3 * 100) + 4 * 200
    assert four.peak == 1000 + 2000 + 1000 + four.communication


def test_zero_2_shares_gradients_and_optimizer_with_float32_masters():
    two = memory("zero2", 4)
    assert (two.weights, two.gradients, two.optimizer) == (2000, 500, 2000 + 1000)
    assert memory("zero3", 4).weights == 500


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3"])
def test_more_processes_never_need_more(strategy):
    peaks = [memory(strategy, count).peak for count in (1, 2, 8, 64)]
    assert peaks == sorted(peaks, reverse=True)


def test_a_loop_over_tensors_needs_a_copy_in_the_optimizer_step():
    assert memory("single", foreach_copies=True).peak == 4000 + 8000 + 8000


def test_repeated_parts():
    assert TIMELINE.repeated({"forward": 3}).peak(gradients=0) == 3 * 2500
