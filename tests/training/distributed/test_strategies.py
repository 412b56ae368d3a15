from __future__ import annotations

import importlib.metadata

import pytest
import torch
from tiny_training import arguments
from torch import nn

from pivotune.errors import UsageError
from pivotune.training.distributed.strategies import (
    check_fsdp,
    check_head,
    check_sharding,
    fsdp_version,
    sharding_unsupported_reason,
    strategy_of,
)


def test_fsdp_1_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UsageError, match="fsdp_version: 2"):
        arguments(tmp_path)


def test_the_trainer_looks_at_what_accelerate_made_of_it(tmp_path, monkeypatch):
    """Where no version is named, Accelerate takes its own default, which is version 1."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    args = arguments(tmp_path)
    assert fsdp_version(args) is None
    assert strategy_of(args) == "fsdp2"
    with pytest.raises(UsageError, match="fsdp_version: 2"):
        check_fsdp(1)


def test_fsdp_2_needs_a_new_accelerate(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    arguments(tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.14.0")
    with pytest.raises(UsageError, match=r"FSDP2 needs accelerate 1\.15 or newer and 1\.14\.0 is installed"):
        arguments(tmp_path)


def test_without_fsdp_any_accelerate_will_do(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.10.0")
    arguments(tmp_path)


def test_training_fsdp_needs_several_processes(tmp_path, monkeypatch):
    args = arguments(tmp_path, fsdp="full_shard", fsdp_config={"cpu_offload": True, "fsdp_version": 2})
    assert fsdp_version(args) == 2
    assert args.fsdp_plugin_args["cpu_offload"]
    monkeypatch.setattr(type(args), "device", torch.device("cuda"))
    with pytest.raises(UsageError, match=r"training\.fsdp needs several processes; start with torchrun"):
        check_sharding(args, quantized=False, optimizer="adamw_torch")
    with pytest.raises(UsageError, match=r"training\.fsdp_config: .* has no effect with fsdp: null; set fsdp: true"):
        arguments(tmp_path, fsdp_config={"fsdp_version": 2})


class _ZeRO:
    def __init__(self, stage):
        self.zero_stage = stage


@pytest.mark.parametrize(("stage", "strategy"), [(1, "zero2"), (2, "zero2"), (3, "zero3")])
def test_deepspeed_is_known_by_its_plugin(tmp_path, stage, strategy):
    """`training.deepspeed` under torchrun sets no variable."""
    args = arguments(tmp_path)
    args.deepspeed_plugin = _ZeRO(stage)
    assert strategy_of(args) == strategy


def test_training_fsdp_is_fsdp2_whoever_started_it(tmp_path):
    args = arguments(tmp_path)
    assert strategy_of(args) == "single"
    args.fsdp_plugin_args = {"fsdp_version": 2}
    assert strategy_of(args) == "fsdp2"


@pytest.mark.parametrize(
    ("strategy", "quantized", "optimizer", "words"),
    [
        ("fsdp2", True, "adamw_torch", "quantize: packed 4-bit weights are not shared out"),
        ("zero3", True, "adamw_torch", "quantize: packed 4-bit weights are not shared out"),
        ("fsdp2", False, "adamw_8bit", "training.optim: adamw_8bit of bitsandbytes"),
        ("fsdp2", False, "paged_adamw_32bit", "training.optim: paged_adamw_32bit of bitsandbytes"),
    ],
)
def test_what_cannot_be_divided_says_what_to_do(strategy, quantized, optimizer, words):
    reason = sharding_unsupported_reason(strategy, quantized=quantized, optimizer=optimizer)
    assert reason is not None
    assert reason.startswith(words)


@pytest.mark.parametrize("strategy", ["single", "ddp", "zero2"])
def test_whole_models_may_be_quantized(strategy):
    assert sharding_unsupported_reason(strategy, quantized=True, optimizer="adamw_8bit") is None
    assert sharding_unsupported_reason("fsdp2", quantized=False, optimizer="adafactor") is None


def test_fsdp_on_a_cpu_is_refused(tmp_path):
    """Accelerate would train by plain data parallelism."""
    args = arguments(tmp_path)
    args.fsdp_plugin_args = {"fsdp_version": 2}
    with pytest.raises(UsageError, match="FSDP2 shards on GPUs only"):
        check_sharding(args, quantized=False, optimizer="adamw_torch")


def test_zero_3_takes_no_adapters_on_the_head(tmp_path):
    args, head = arguments(tmp_path), nn.Linear(2, 2)
    args.deepspeed_plugin = _ZeRO(3)
    check_head(args, head)
    with pytest.raises(UsageError, match=r"lora\.target_modules"):
        check_head(args, nn.Sequential(head))
    args.deepspeed_plugin = _ZeRO(2)
    check_head(args, nn.Sequential(head))
