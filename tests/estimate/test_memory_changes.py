from __future__ import annotations

import pytest
import torch
from tiny_training import run_config

from pivotune.estimate.memory_changes import MemoryExhaustedError, explained_out_of_memory, memory_changes
from pivotune.runs.execute import execute_run
from pivotune.runs.prepare import prepare_run
from pivotune.training.arguments import build_arguments

ERRORS = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    "python": MemoryError(),
}


def training(**changes) -> dict:
    return {"per_device_train_batch_size": 8, "use_cpu": True, "bf16": False, **changes}


def explained(config, error) -> str:
    with (
        pytest.raises(MemoryExhaustedError) as raised,
        explained_out_of_memory(config, build_arguments(config), "training"),
    ):
        raise error
    assert raised.value.__cause__ is error
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_one_line_with_three_settings(tmp_path, error):
    text = explained(run_config(tmp_path, training=training()), error)
    assert "out of memory while training" in text
    assert "training.per_device_train_batch_size=4 with training.gradient_accumulation_steps=2 (same steps)" in text
    assert "training.gradient_checkpointing=true" in text


def test_what_is_set_already_is_not_named(tmp_path):
    changes = training(per_device_train_batch_size=1, gradient_checkpointing=True)
    text = explained(run_config(tmp_path, training=changes, lora={"r": 4}), ERRORS["gpu"])
    assert "per_device_train_batch_size" not in text
    assert "checkpointing" not in text
    assert "lora=" not in text
    assert "quantize=4bit" in text
    assert "data.max_prompt_tokens=128 with data.max_completion_tokens=128" in text


def test_odd_batches_are_divided_evenly(tmp_path):
    config = run_config(tmp_path, training=training(per_device_train_batch_size=9, gradient_accumulation_steps=2))
    change = memory_changes(config, build_arguments(config), cuda=False, strategy="single")[0]
    assert change.training == {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 6}


def test_other_errors_pass(tmp_path):
    config = run_config(tmp_path, training=training())
    with pytest.raises(RuntimeError, match="something else"):
        explained(config, RuntimeError("something else"))


def test_a_run_says_when_memory_ran_out(tmp_path, monkeypatch):
    prepared = prepare_run(run_config(tmp_path))
    from pivotune.runs import execute as run

    def fail(*args, **kwargs):
        raise ERRORS["cpu"]

    monkeypatch.setattr(run.DeepSupervisionTrainer, "train", fail)
    with pytest.raises(MemoryExhaustedError, match="while training"):
        execute_run(prepared)
