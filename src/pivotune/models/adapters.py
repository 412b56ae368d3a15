"""LoRA: refuse adapters that cannot be merged, add the others, and merge them into a plain model."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pivotune.config.settings import LoraSettings
from pivotune.errors import UsageError
from pivotune.models.architecture import find_architecture


def build_lora_config(settings: LoraSettings, model: PreTrainedModel) -> Any:
    """Return a `peft.LoraConfig` from the `lora:` section of a run configuration."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )


def add_adapters(model: PreTrainedModel, peft_config: Any) -> Any:
    """Wrap a model with adapters after refusing those that cannot be merged.

    Raises:
        UsageError: an adapter on a tied head or embedding (merging changes both uses of the one matrix), or modules
            that the model does not have.
    """
    from peft import get_peft_model

    if hasattr(model, "peft_config"):
        raise UsageError("the model already has adapters; merge them or leave peft_config (lora:) out")
    if is_tied(model):
        _refuse_tied(model, peft_config)
    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:
        raise UsageError(f"lora.target_modules: {' '.join(str(error).split())}") from error


def check_adapters(settings: LoraSettings, model_config: Any, *, trust_remote_code: bool = False) -> None:
    """Raise the errors of `add_adapters` from the configuration alone: no weight is loaded or made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
        add_adapters(model, build_lora_config(settings, model))


def is_tied(model: PreTrainedModel) -> bool:
    """Return True if head and input embedding are one matrix."""
    return find_architecture(model).head_weight is cast(nn.Embedding, model.get_input_embeddings()).weight


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Merge a loaded adapter into its model and make all of it trainable: PEFT freezes it for inference."""
    if not hasattr(model, "peft_config"):
        return model
    merged: PreTrainedModel = cast(Any, model).merge_and_unload()
    for parameter in merged.parameters():
        # Quantized weights are integers and stay as they are.
        parameter.requires_grad_(parameter.is_floating_point())
    return merged


def _refuse_tied(model: PreTrainedModel, peft_config: Any) -> None:
    ends = find_architecture(model).lm_head, cast(nn.Module, model.get_input_embeddings())
    names = [name for name, module in model.named_modules() if module in ends]
    for option, matches in _MATCHES.items():
        wanted = getattr(peft_config, option, None)
        for name in names:
            if wanted and matches(wanted, name):
                raise UsageError(
                    f"lora.{option}: {name.rpartition('.')[2]} is not allowed; this model ties its head to its embedding "
                    "and an adapter on one would merge into both"
                )


def _targets(wanted: Any, name: str) -> bool:
    """Match PEFT's `target_modules`: names or their last parts, a pattern, or `all-linear` (all but the head)."""
    if isinstance(wanted, str):
        return wanted != "all-linear" and re.fullmatch(wanted, name) is not None
    return any(name == item or name.endswith(f".{item}") for item in wanted)


# PEFT's rules, option by option, for the modules that an option selects.
_MATCHES: dict[str, Callable[[Any, str], bool]] = {
    "target_modules": _targets,
    "target_parameters": lambda wanted, name: _targets(wanted, f"{name}.weight"),
    "modules_to_save": lambda wanted, name: any(name.endswith(item) for item in wanted),
    "trainable_token_indices": lambda wanted, name: True,
}
