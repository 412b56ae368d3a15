"""`model/` and `adapter/` of a run: plain Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pivotune.training.resilience.checkpoints import staged_folder


def save_model(model: Any, tokenizer: Any, folder: Path, *, dtype: torch.dtype) -> Any:
    """Write `model/`, a plain Hugging Face folder in the starting model's dtype; adapters also apart in `adapter/`.

    Adapters are merged, so that `AutoModelForCausalLM` and vLLM load the folder; those on a quantized base are not
    (merging would round them away) and `model/` then holds the adapters alone. Returns the model as it was saved.
    """
    quantized = getattr(model, "quantization_method", None) or getattr(model.config, "quantization_config", None)
    if hasattr(model, "peft_config") and not quantized:
        with staged_folder(folder / "adapter") as staging:
            model.save_pretrained(staging)
        model = model.merge_and_unload()
    with staged_folder(folder / "model") as staging:
        if not quantized:
            _cast_weights(model, dtype)
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return model


def _cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Only the weights: `model.to` would also round the rotary frequencies, which no model folder holds."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
