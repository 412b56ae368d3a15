"""`model/` and `adapter/` of a run: gather sharded weights, merge adapters, write plain Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pivotune.errors import UsageError
from pivotune.models.architecture import unwrap_model
from pivotune.training.distributed import ranks
from pivotune.training.resilience.checkpoints import staged_folder


def is_sharded(trainer: Trainer) -> bool:
    """Return True if no process holds all weights: FSDP2, or DeepSpeed ZeRO-3."""
    if trainer.is_fsdp_enabled:
        return True
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    return plugin is not None and plugin.zero_stage == 3


def gathered_model(trainer: Trainer, make_model: Callable[[], Any]) -> Any:
    """Return the trained model with all its weights; a sharded model only on rank 0, None elsewhere. All ranks call this.

    Args:
        make_model: makes the model as training began with it, adapters included, on the CPU; its weights are replaced.

    Raises:
        UsageError: ZeRO-3 without `stage3_gather_16bit_weights_on_model_save`, which gathers them.
    """
    if not is_sharded(trainer):
        return trainer.model
    try:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    except ValueError as error:
        raise UsageError(f"the weights cannot be gathered: {' '.join(str(error).split())}") from error
    if not ranks.is_main():
        return None
    if trainer.is_deepspeed_enabled:
        # Otherwise Transformers would partition the new model too, which needs the other processes.
        unset_hf_deepspeed_config()
    model = make_model()
    model.generation_config = unwrap_model(cast(nn.Module, trainer.model)).generation_config
    missing, unexpected = model.load_state_dict(state, strict=False)
    # A head that is tied to the embedding is gathered under one name.
    untied = dict(model.named_parameters()).keys()
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - untied
    lost = [*sorted(set(missing) - tied), *unexpected]
    if lost:
        raise RuntimeError(f"{len(lost)} gathered weights do not fit the model, first {lost[0]}")
    return model


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Round the weights alone: `model.to` would also round the rotary frequencies, which no model folder holds."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def save_model(model: Any, tokenizer: Any, folder: Path, *, dtype: torch.dtype) -> Any:
    """Write `model/` in the starting model's dtype, and adapters also to `adapter/`; return the model as it was saved.

    Adapters are merged, so that `AutoModelForCausalLM` and vLLM load the folder. Adapters on a quantized base are not
    merged, because merging would round them away; `model/` then holds the adapters alone.
    """
    quantized = getattr(model, "quantization_method", None) or getattr(model.config, "quantization_config", None)
    if hasattr(model, "peft_config") and not quantized:
        with staged_folder(folder / "adapter") as staging:
            model.save_pretrained(staging)
        model = model.merge_and_unload()
    with staged_folder(folder / "model") as staging:
        if not quantized:
            cast_weights(model, dtype)
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return model
