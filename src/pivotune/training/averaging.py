"""`ema`: an exponential moving average of the trained weights, kept in checkpoints and put into the model at the end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState

from pivotune.errors import UsageError

logger = logging.getLogger(__name__)
AVERAGE_FILE = "average.safetensors"
# Share of the starting weights in the average above which little of the training is saved.
MUCH_OF_THE_START = 0.5


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

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
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

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        weights = [tensor.float() for tensor in trained_weights(self._trainer.model).values()]
        self._update(list(self._average.values()), weights, 0)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for name, tensor in trained_weights(self._trainer.model).items():
            tensor.copy_(self._average[name])
        self._average = {}


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters by name, tied ones once, as tensors that can be written in place."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
