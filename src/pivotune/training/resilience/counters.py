"""Counters of a run that survive its processes, and the record of one optimizer step.

Non-finite losses and gradients are found before the optimizer changes a weight, and named by term and rows.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from pivotune.data.formats import row_name
from pivotune.errors import TrainingError
from pivotune.objectives.base import LossTerm

logger = logging.getLogger(__name__)
_ROWS_NAMED = 16


class TrainingDivergedError(TrainingError):
    """A loss or the gradient is not finite; the weights are those of the step before."""


class StepRecord:
    """Losses, terms and row numbers of the micro-batches of one optimizer step. Nothing waits for the device.

    Args:
        sources: the sources of the rows, as in `Rows.sources`.
    """

    def __init__(self, sources: Mapping[str, int] | None = None) -> None:
        self._sources = sources or {}
        self._losses: list[Tensor] = []
        self._terms: list[dict[str, Tensor]] = []
        self._rows: list[Tensor] = []

    def clear(self) -> None:
        """Begin a new optimizer step."""
        for kept in (self._losses, self._terms, self._rows):
            kept.clear()

    def add_terms(self, terms: Mapping[str, LossTerm], batch: Mapping[str, Tensor]) -> None:
        """Add the terms of a micro-batch, and its row numbers if it has them."""
        self._terms.append({name: term.sum.detach() for name, term in terms.items()})
        self._rows.append(batch.get("row_numbers", torch.zeros(0, dtype=torch.long)))

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of the same micro-batch."""
        self._losses.append(loss.detach())

    def bad_losses(self) -> Tensor:
        """Return the number of non-finite losses, a float32 scalar on the device of the losses."""
        return (~torch.isfinite(torch.stack(self._losses))).sum().float()

    def describe(self, step: int, gradient_norm: float, *, in_loss: bool) -> str:
        """Return a line that names the terms and rows. Waits for the device.

        Args:
            step: the optimizer step, from 1.
            gradient_norm: named with all rows of the step if no loss is non-finite.
            in_loss: a loss is non-finite on some rank; the gradient is that of all ranks together.
        """
        bad = [index for index, loss in enumerate(self._losses) if not math.isfinite(loss.item())]
        if bad:
            # The `compute_loss` of a subclass may record no terms.
            terms = [self._terms[index] for index in bad if index < len(self._terms)]
            found = {name: value.item() for each in terms for name, value in each.items()}
            broken = ", ".join(f"{name} {value:g}" for name, value in found.items() if not math.isfinite(value))
            return (
                f"the loss is not a finite number at step {step} ({broken or 'no term by itself'}; {self._name(bad)})"
            )
        if in_loss:
            return f"the loss is not a finite number at step {step} (in rows of another process)"
        rows = self._name(range(len(self._rows)))
        return f"the gradient is not a finite number at step {step} (norm {gradient_norm:g}; {rows})"

    def _name(self, indices: Sequence[int]) -> str:
        numbers = [number for index in indices if index < len(self._rows) for number in self._rows[index].tolist()]
        known = sorted({number for number in numbers if number > 0})
        if not known:
            return "rows without numbers"
        more = f" and {len(known) - _ROWS_NAMED} more" if len(known) > _ROWS_NAMED else ""
        return f"rows {', '.join(str(row_name(number, self._sources)) for number in known[:_ROWS_NAMED])}{more}"


class PivotuneCounters(TrainerCallback, ExportableState):
    """Counters of a run over all its processes, kept in `trainer_state.json` under the name of this class.

    Also gives every other callback with a `state()` its attributes back (patience of early stopping), which `Trainer`
    does on request only.

    Args:
        trainer: the `FaultTolerantTrainer`.

    Attributes:
        total_loss: sum of the logged losses times their steps.
        initial_step: the step that the counters began at.
        seconds: training time of the processes before.
        skipped_steps: optimizer steps that were skipped.
        window_steps, window_skipped: optimizer steps since the last log line, and the skipped ones among them.
        nonfinite: the line that describes a non-finite loss or gradient of this step, or None.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._collected: dict[str, Any] = {}
        self._clear(0)

    def _clear(self, step: int) -> None:
        self.total_loss = self.seconds = 0.0
        self.initial_step = step
        self.skipped_steps = self.window_steps = self.window_skipped = 0
        self.nonfinite: str | None = None
        self._loss_sum = self._marked = torch.zeros((), device=self._trainer.args.device)
        self._began = time.time()

    def state(self) -> dict[str, Any]:
        """Return the counters as `collect` has summed them over the ranks."""
        return {"args": {}, "attributes": self._collected}

    def collect(self) -> None:
        """Sum the counters for a checkpoint. All ranks call this."""
        trainer = self._trainer
        self._collected = {
            "loss_sum": self._mean_over_ranks(),
            "total_loss": self.total_loss,
            "initial_step": self.initial_step,
            "seconds": self.seconds + time.time() - self._began,
            "skipped_steps": self.skipped_steps,
            "window_steps": self.window_steps,
            "window_skipped": self.window_skipped,
            "window": trainer._window.state(trainer._sum_over_ranks),
        }

    def _mean_over_ranks(self) -> float:
        return self._trainer._sum_over_ranks(self._loss_sum.clone()).item() / self._trainer.accelerator.num_processes

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch."""
        self._loss_sum = self._loss_sum + loss

    # ---- events ----

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Give counters, and other callbacks' attributes, the values of the checkpoint that the run resumes from."""
        self._clear(state.global_step)
        # `Trainer` would keep the intervals of the checkpoint.
        state.compute_steps(args, state.max_steps)
        kept = cast(dict[str, Any], state.stateful_callbacks)
        for callback in (*self._trainer.callback_handler.callbacks, control):
            if not isinstance(callback, ExportableState):
                continue
            # `Trainer` cannot save the state of a callback that its checkpoint does not know.
            found = kept.setdefault(type(callback).__name__, callback.state())
            if state.global_step == 0 or not isinstance(found, dict):
                continue
            # Earlier versions kept the counters without a name of their own.
            attributes = found.get("attributes", found)
            if callback is self and "window" in attributes:
                self._restore(attributes)
            elif callback is not self and callback is not control:
                # The file may come from elsewhere: only attributes that the callback itself keeps.
                for name in callback.state()["attributes"].keys() & attributes.keys():
                    setattr(callback, name, attributes[name])

    def _restore(self, found: dict[str, Any]) -> None:
        for name in ("total_loss", "initial_step", "seconds", "skipped_steps", "window_steps", "window_skipped"):
            setattr(self, name, found[name])
        self._loss_sum = torch.full_like(self._loss_sum, found["loss_sum"])
        # Sums over all ranks are continued on one of them.
        self._trainer._window.restore(found["window"], counts=self._trainer.accelerator.is_main_process)
        # Speeds are of the whole run.
        self._trainer._initial_global_step = self.initial_step

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer._step.clear()
        self._trainer._window.mark()
        self._marked = self._loss_sum

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Skip the step if its loss or gradient is non-finite.

        Raises:
            TrainingDivergedError: steps are not to be skipped, or `faults.skip_limit` steps were.
        """
        self.window_steps += 1
        if self.nonfinite is None:
            return
        limit = args.faults.skip_limit
        if args.faults.nonfinite == "stop":
            raise TrainingDivergedError(
                f"{self.nonfinite}; the weights are those of the step before; look at these rows, lower "
                "training.learning_rate or the supervision weights, or set faults.nonfinite: skip"
            )
        if self.skipped_steps >= limit:
            raise TrainingDivergedError(
                f"{self.nonfinite}; {limit} steps were skipped before, the limit of faults.skip_limit; look at these rows, "
                "or lower training.learning_rate or the supervision weights"
            )
        self.skipped_steps += 1
        logger.warning("%s: step skipped (%d of at most %d)", self.nonfinite, self.skipped_steps, limit)
        self.window_skipped += 1
        self._loss_sum = self._marked
        self._trainer._window.rollback()
        # An optimizer passes over weights without a gradient: they and their moments stay, and the schedule goes on.
        model.zero_grad()

    # ---- log lines ----

    def complete(self, logs: dict[str, float]) -> None:
        """Correct a log line: means over the steps that were done, figures of the whole run. All ranks call this."""
        done = self.window_steps - self.window_skipped
        if "loss" in logs or "train_loss" in logs:
            loss = self._mean_over_ranks()
            self.total_loss += loss
            if "loss" in logs:
                logs["loss"] = loss / done if done else math.nan
                if self.skipped_steps:
                    logs["skipped_steps"] = self.skipped_steps
            self.window_steps = self.window_skipped = 0
            self._loss_sum = torch.zeros_like(self._loss_sum)
        if "train_loss" in logs:
            steps = self._trainer.state.global_step - self.initial_step - self.skipped_steps
            logs["train_loss"] = self.total_loss / max(steps, 1)
            seconds = logs["train_runtime"]
            logs["train_runtime"] = seconds + self.seconds
            for name in ("train_samples_per_second", "train_steps_per_second"):
                if name in logs and self.seconds:
                    logs[name] *= seconds / logs["train_runtime"]
