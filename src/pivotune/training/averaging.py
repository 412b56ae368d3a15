"""Weights that replace the trained ones at the end: their moving average (`ema`), and the way back to the starting ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerState

from pivotune.errors import UsageError

logger = logging.getLogger(__name__)
AVERAGE_FILE = "average.safetensors"
# Share of the starting weights in the average above which little of the training is saved.
MUCH_OF_THE_START = 0.5
# Parts of the names of an adapter's factors.
_LORA_A, _LORA_B = (".lora_A.", ".lora_embedding_A."), (".lora_B.", ".lora_embedding_B.")


class WeightAverage(TrainerCallback):
    """Average of the trained weights in float32: `average = decay * average + (1 - decay) * weights` after every step.

    It begins with the starting weights. Evaluations in the training read the weights themselves; at its end the average
    replaces them. (`torch.optim.swa_utils.AveragedModel` would copy the frozen weights too, in their own dtype.)

    Args:
        trainer: its model is averaged; `resumed_from` names the checkpoint that holds the average so far.
        decay: share of the average that a step keeps.
    """

    def __init__(self, trainer: Any, decay: float) -> None:
        self._trainer, self._decay = trainer, decay
        self._update = get_ema_multi_avg_fn(decay)
        self._average: dict[str, Tensor] = {}

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint."""
        save_file({name: tensor.contiguous() for name, tensor in self._average.items()}, folder / AVERAGE_FILE)

    # ---- events ----

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Begin with the model's weights, or with the average in the checkpoint.

        Raises:
            UsageError: the checkpoint has no average of these weights.
        """
        if (start := self._decay**state.max_steps) > MUCH_OF_THE_START:
            logger.warning(
                "ema: %g keeps %.0f %% of the starting weights in the average after %d steps; lower it, or leave it out",
                self._decay, 100 * start, state.max_steps,
            )  # fmt: skip
        trained = trained_weights(self._trainer.model)
        self._average = {name: tensor.float().clone() for name, tensor in trained.items()}
        if self._trainer.resumed_from is None:
            return
        path = self._trainer.resumed_from / AVERAGE_FILE
        found = load_file(path) if path.is_file() else {}
        if found.keys() != trained.keys():
            raise UsageError(
                f"{path}: holds no average of these weights; resume with the ema that the run was begun with"
            )
        for name, average in self._average.items():
            average.copy_(found[name])

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        weights = [tensor.float() for tensor in trained_weights(self._trainer.model).values()]
        self._update(list(self._average.values()), weights, 0)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        for name, tensor in trained_weights(self._trainer.model).items():
            tensor.copy_(self._average[name])
        self._average = {}


def interpolate_weights(trained: Mapping[str, Tensor], start: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return `share * trained + (1 - share) * start` for every trained weight, with its dtype and on its device.

    Args:
        trained, start: name -> tensor of one shape on both sides; a starting weight that is not trained is left out.
        share: from 0 (starting weights) to 1 (trained weights).
    """
    return {name: torch.lerp(start[name].to(tensor), tensor, share) for name, tensor in trained.items()}


class Interpolation(TrainerCallback):
    """Replace the trained weights by interpolated ones when the training ends; checkpoints hold the trained ones.

    The line between both keeps much of the starting model's knowledge and much of the trained one's (Wortsman et al., arXiv
    2109.01903, section 3). Adapters are the product of A and B, and B starts as zeros: B is scaled, and nothing is read.

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
                if not any(part in name for part in _LORA_A) and (tensor.any() or not is_lora_b(name)):
                    raise UsageError(
                        f"interpolate: {share:g} scales LoRA adapters that start as zeros, and {name} is trained too; "
                        "leave out interpolate, or train plain LoRA (init_lora_weights: true) or the whole model"
                    )
        elif load_start is None:
            raise UsageError(
                f"interpolate: {share:g} reads the starting weights again at the end; give the model by its name, or give "
                "load_start"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        weights = trained_weights(model)
        if hasattr(model, "peft_config"):
            weights = {name: tensor for name, tensor in weights.items() if is_lora_b(name)}
            start: Mapping[str, Tensor] = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        else:
            assert self._load_start is not None
            start = {name: tensor.detach() for name, tensor in self._load_start().named_parameters()}
        for name, tensor in interpolate_weights(weights, start, self._share).items():
            weights[name].copy_(tensor)


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters by name, tied ones once, as tensors that can be written in place."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def is_lora_b(name: str) -> bool:
    """Return True for the name of an adapter's factor B, which starts as zeros."""
    return any(part in name for part in _LORA_B)
