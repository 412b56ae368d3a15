"""Strategies that divide a run over processes: single, DDP, FSDP2, ZeRO. Unsupported combinations are refused early."""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from packaging.version import Version
from torch import nn
from transformers import TrainingArguments

from pivotune.errors import UsageError
from pivotune.training.optimizers import needs_bitsandbytes

logger = logging.getLogger(__name__)
Strategy = Literal["single", "ddp", "fsdp2", "zero2", "zero3"]
# The first version that keeps norm and head together, gathered from the forward to the backward pass.
_ACCELERATE_FOR_FSDP2 = "1.15"


def strategy_of(args: TrainingArguments) -> Strategy:
    """Return the strategy of a run before a trainer exists. ZeRO-1 counts as ZeRO-2."""
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage > 0:
        return "zero3" if args.deepspeed_plugin.zero_stage == 3 else "zero2"
    if args.fsdp_plugin_args is not None or _launched_with_fsdp():
        return "fsdp2"
    return "ddp" if args.world_size > 1 else "single"


def fsdp_version(args: TrainingArguments) -> int | None:
    """Return the version of FSDP that `training.fsdp` or `accelerate launch` names, or None."""
    if args.fsdp_plugin_args is not None:
        return int(args.fsdp_plugin_args["fsdp_version"])
    # Accelerate leaves FSDP_VERSION to later programs of the process; ACCELERATE_USE_FSDP it sets at launch only.
    return int(os.environ["FSDP_VERSION"]) if _launched_with_fsdp() and "FSDP_VERSION" in os.environ else None


def _launched_with_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


# ---- checks ----


def check_fsdp(version: int | None) -> None:
    """Refuse FSDP 1, whose flattened parameters the losses cannot read, and an Accelerate too old for FSDP2.

    Raises:
        UsageError: names the setting or the package to change.
    """
    if version is None:
        return
    if version == 1:
        raise UsageError("FSDP version 1 is not supported; set fsdp_version: 2 (configs/accelerate/fsdp2.yaml)")
    found = importlib.metadata.version("accelerate")
    if Version(found) < Version(_ACCELERATE_FOR_FSDP2):
        raise UsageError(
            f"FSDP2 needs accelerate {_ACCELERATE_FOR_FSDP2} or newer and {found} is installed; upgrade it"
        )


def sharding_unsupported_reason(strategy: Strategy, *, quantized: bool, optimizer: str) -> str | None:
    """Return the reason why a run cannot use the strategy and the remedy, or None."""
    if quantized and strategy in ("fsdp2", "zero3"):
        return "quantize: packed 4-bit weights are not shared out; train with DDP or ZeRO-2, or without quantize"
    if strategy == "fsdp2" and needs_bitsandbytes(optimizer):
        return (
            f"training.optim: {optimizer} of bitsandbytes does not know FSDP2's shards; set adamw_torch or adafactor, or "
            "train with ZeRO"
        )
    return None


def whole_weights_reason(strategy: Strategy, *, ema: float | None, interpolate: float) -> str | None:
    """Return the reason why a strategy cannot use `ema` or `interpolate`, and the remedy, or None."""
    key, value = ("ema", ema) if ema is not None else ("interpolate", interpolate)
    if value in (None, 1.0) or strategy in ("single", "ddp"):
        return None
    return (
        f"{key}: {value:g} needs whole weights in every process, and {strategy} shards them; use DDP, or leave it out"
    )


def check_sharding(args: TrainingArguments, *, quantized: bool, optimizer: str) -> None:
    """Refuse, before the model is loaded, a combination that would fail later or not be sharded at all.

    Raises:
        UsageError: names the setting to change.
    """
    strategy = strategy_of(args)
    if strategy == "fsdp2" and args.device.type == "cpu":
        # Accelerate would run plain data parallelism without a message.
        raise UsageError("FSDP2 shards on GPUs only; on CPUs start with torchrun, or accelerate launch --cpu")
    if args.fsdp and args.world_size == 1:
        raise UsageError("training.fsdp needs several processes; start with torchrun or accelerate launch")
    if strategy == "fsdp2" and (args.fsdp_plugin_args or {}).get("cpu_offload") and not _launched_with_fsdp():
        # Only its own launcher makes Accelerate set up a backend for CPU tensors.
        raise UsageError("training.fsdp: cpu_offload needs accelerate launch (configs/accelerate/fsdp2.yaml)")
    reason = sharding_unsupported_reason(strategy, quantized=quantized, optimizer=optimizer)
    if reason is not None:
        raise UsageError(reason)


def check_head(args: TrainingArguments, head: nn.Module) -> None:
    """Refuse adapters on the head under ZeRO-3: they gather for every chunk of rows, and ranks have unequally many.

    Raises:
        UsageError: names the setting to change.
    """
    if strategy_of(args) == "zero3" and type(head) is not nn.Linear:
        raise UsageError(
            f"the model's head is a {type(head).__name__}, which ZeRO-3 cannot share out; leave it out of "
            "lora.target_modules, or train with FSDP2 or ZeRO-2"
        )


# ---- set-up ----


def prepare_fsdp(accelerator: Accelerator, args: TrainingArguments, blocks: Iterable[nn.Module]) -> None:
    """Check Accelerate's FSDP plugin and set it so that a step equals that of one process.

    - Shard block by block. Without classes from the user the plugin asks the model, and a multimodal model names classes
      that it does not have.
    - Reduce gradients to shards after every micro-batch, unless `training.accelerator_config` differs. Accelerate would
      wait for the last micro-batch and keep the gradients of the whole model meanwhile.
    - Under mixed precision, sum gradients over ranks and micro-batches in float32, as autocast does on one device.
      Accelerate would sum them in the dtype of the products.

    Raises:
        UsageError: as `check_fsdp`.
    """
    plugin: Any = accelerator.state.fsdp_plugin
    check_fsdp(plugin.fsdp_version)
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in blocks})
    given = cast(Any, args.accelerator_config).gradient_accumulation_kwargs or {}
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = given.get("sync_each_batch", True)
    policy = plugin.mixed_precision_policy
    if policy is not None and policy.reduce_dtype == policy.param_dtype == torch.bfloat16:
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32)


def use_one_device(args: TrainingArguments) -> None:
    """Use one GPU in each process: the replicas of `DataParallel` do not run the taps."""
    if args.n_gpu > 1:
        logger.warning("one of %d GPUs is used; start with torchrun or accelerate launch to use all", args.n_gpu)
        args._n_gpu = 1
