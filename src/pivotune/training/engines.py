"""Which ways of sharding a model are supported, checked before anything slow."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterable
from typing import Any

from packaging.version import Version
from torch import nn
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
    if version is not None:
        check_fsdp(version)


def check_fsdp(version: int) -> None:
    """Refuse a version of FSDP, or the Accelerate that is installed.

    Raises:
        UsageError: as `check_engine`.
    """
    if version == 1:
        raise UsageError("FSDP version 1 is not supported; set fsdp_version: 2 (configs/accelerate/fsdp2.yaml)")
    found = importlib.metadata.version("accelerate")
    if Version(found) < Version(_ACCELERATE_FOR_FSDP2):
        raise UsageError(
            f"FSDP2 needs accelerate {_ACCELERATE_FOR_FSDP2} or newer and {found} is installed; upgrade it"
        )


def prepare_plugin(plugin: Any, blocks: Iterable[nn.Module]) -> None:
    """Check Accelerate's FSDP plugin, and have it shard block by block where the user has named no classes.

    Left to itself it asks the model, and a multimodal one names classes that it does not have.

    Raises:
        UsageError: as `check_engine`.
    """
    check_fsdp(plugin.fsdp_version)
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in blocks})


def shards_weights(args: TrainingArguments) -> bool:
    """Whether FSDP or ZeRO-3 will share the weights out, told before a trainer is there."""
    plugin = args.deepspeed_plugin
    sharded = args.fsdp_plugin_args is not None or _launched_with_fsdp()
    return sharded or (plugin is not None and plugin.zero_stage == 3)


def fsdp_version(args: TrainingArguments) -> int | None:
    """The version of FSDP that `training.fsdp` or `accelerate launch` asks for; None where none is named."""
    if args.fsdp_plugin_args is not None:
        return int(args.fsdp_plugin_args["fsdp_version"])
    # Accelerate sets the first one for later programs of the process too, and the second one at launch only.
    return int(os.environ["FSDP_VERSION"]) if _launched_with_fsdp() and "FSDP_VERSION" in os.environ else None


def _launched_with_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
