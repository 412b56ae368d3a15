"""Which ways of sharding a model are supported, checked before anything slow."""

from __future__ import annotations

import importlib.metadata
import os

from packaging.version import Version
from transformers import TrainingArguments

from pivotune.errors import UsageError

# The first one that keeps norm and head together, gathered from the forward to the backward pass.
_ACCELERATE_FOR_FSDP2 = "1.15"


def check_engine(args: TrainingArguments) -> None:
    """Refuse FSDP 1, whose flattened parameters the losses cannot read, and FSDP2 with an Accelerate that is too old.

    Raises:
        UsageError: says what to set or install.
    """
    version = fsdp_version(args)
    if version == 1:
        raise UsageError("FSDP version 1 is not supported; set fsdp_version: 2 (configs/accelerate/fsdp2.yaml)")
    found = importlib.metadata.version("accelerate")
    if version is not None and Version(found) < Version(_ACCELERATE_FOR_FSDP2):
        raise UsageError(
            f"FSDP2 needs accelerate {_ACCELERATE_FOR_FSDP2} or newer and {found} is installed; upgrade it"
        )


def shards_weights(args: TrainingArguments) -> bool:
    """Whether FSDP or ZeRO-3 will share the weights out, told before a trainer is there."""
    plugin = args.deepspeed_plugin
    return fsdp_version(args) is not None or (plugin is not None and plugin.zero_stage == 3)


def fsdp_version(args: TrainingArguments) -> int | None:
    """The version of FSDP that `training.fsdp` or `accelerate launch` asks for; None where none is asked for."""
    if args.fsdp_plugin_args is not None:
        return int(args.fsdp_plugin_args["fsdp_version"])
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return int(os.environ.get("FSDP_VERSION", "1"))
    return None
