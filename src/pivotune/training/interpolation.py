"""`interpolate`: at the end of a training its weights move part of the way back to the starting weights.

Wortsman et al., "Robust fine-tuning of zero-shot models" (arXiv 2109.01903), section 3: the line between both keeps much of
the starting model's knowledge and much of the trained one's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from pivotune.errors import UsageError
from pivotune.training.averaging import trained_weights


def interpolate_weights(trained: Mapping[str, Tensor], start: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return `share * trained + (1 - share) * start` for every trained weight, with its dtype and on its device.

    Args:
        trained, start: name -> tensor of one shape on both sides; a starting weight that is not trained is left out.
        share: from 0 (starting weights) to 1 (trained weights).
    """
    return {name: torch.lerp(start[name].to(tensor), tensor, share) for name, tensor in trained.items()}


class Interpolation(TrainerCallback):
    """Replace the trained weights by interpolated ones when the training ends; checkpoints hold the trained ones.

    Adapters are the product of A and B, and B starts as zeros: B is scaled, and nothing is read.

    Args:
        model: the model before the first step, with its adapters.
        share: of the trained weights.
        load_start: reads the starting model again, so that no copy is kept in the training.

    Raises:
        UsageError: no way to read the starting model again, or adapters that do not start as zeros.
    """

    def __init__(self, model: nn.Module, share: float, load_start: Callable[[], nn.Module] | None) -> None:
        self._share, self._load_start = share, load_start
        if hasattr(model, "peft_config"):
            for name, tensor in trained_weights(model).items():
                if not _is_a(name) and (tensor.any() or not is_lora_b(name)):
                    raise UsageError(
                        f"interpolate: {share:g} scales LoRA adapters that start as zeros, and {name} is trained too; "
                        "leave out interpolate, or train plain LoRA (init_lora_weights: true) or the whole model"
                    )
        elif load_start is None:
            raise UsageError(
                f"interpolate: {share:g} reads the starting weights again at the end; give the model by its name, or give "
                "load_start"
            )

    def on_train_end(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        weights = trained_weights(model)
        if hasattr(model, "peft_config"):
            weights = {name: tensor for name, tensor in weights.items() if is_lora_b(name)}
            start: Mapping[str, Tensor] = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        else:
            assert self._load_start is not None
            start = {name: tensor.detach() for name, tensor in self._load_start().named_parameters()}
        for name, tensor in interpolate_weights(weights, start, self._share).items():
            weights[name].copy_(tensor)


def _is_a(name: str) -> bool:
    return ".lora_A." in name or ".lora_embedding_A." in name


def is_lora_b(name: str) -> bool:
    """Return True for the name of an adapter's factor B, which starts as zeros."""
    return ".lora_B." in name or ".lora_embedding_B." in name
