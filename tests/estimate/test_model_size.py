from __future__ import annotations

import pytest
import torch
from conftest import build_tiny_model, tiny_config
from tiny_training import run_settings

from pivotune.config.yaml_text import parse_config
from pivotune.estimate.model_size import FOUR_BIT_BYTES, measure_model, meta_model, optimizer_bytes
from pivotune.training.optimizers import optimizer_names


def sizes(folder, family="llama", *, optimizer="adamw_torch", **changes):
    config = parse_config({**run_settings(folder), **changes})
    model = meta_model(config, tiny_config(family))
    return measure_model(model, optimizer=optimizer, quantized=config.quantize is not None)


def test_parameters_are_those_of_the_model(distinct_family, tmp_path):
    model = build_tiny_model(distinct_family)
    size = sizes(tmp_path, distinct_family)
    assert size.total == size.trained == sum(parameter.numel() for parameter in model.parameters())
    assert size.trained_bytes == 4 * size.total
    assert size.num_layers == 4


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
    for name in optimizer_names():
        assert 0 <= optimizer_bytes(model, name) <= 1.5 * whole


def test_eight_bit_states_leave_embeddings_and_small_tensors_alone():
    model = build_tiny_model(hidden_size=128, num_attention_heads=4, num_key_value_heads=4)
    saved = optimizer_bytes(model, "adamw_torch") - optimizer_bytes(model, "adamw_8bit")
    large = sum(p.numel() for name, p in model.named_parameters() if p.numel() >= 4096 and "embed" not in name)
    assert saved == pytest.approx(large * (8 - 2 * (1 + 4 / 256)))
