"""Counters of a run that survive its processes: losses, steps, seconds, and the open log window."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from pivotune.training.resilience.nonfinite import check_skip

if TYPE_CHECKING:
    from pivotune.training.resilience.fault_tolerant import FaultTolerantTrainer


class PivotuneCounters(TrainerCallback, ExportableState):
    """Counters of a run over all its processes, kept in `trainer_state.json` under the name of this class.

    Also gives every other callback with a `state()` its attributes back (patience of early stopping), which `Trainer`
    does on request only.

    Attributes:
        total_loss: sum of the logged losses times their steps.
        initial_step: the step that the counters began at.
        seconds: training time of the processes before.
        skipped_steps: optimizer steps that were skipped.
        window_steps, window_skipped: optimizer steps since the last log line, and the skipped ones among them.
        nonfinite: the line that describes a non-finite loss or gradient of this step, or None.
    """

    def __init__(self, trainer: FaultTolerantTrainer) -> None:
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

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Skip the step if its loss or gradient is non-finite, or raise `TrainingDivergedError`."""
        self.window_steps += 1
        if self.nonfinite is None:
            return
        faults = args.faults
        check_skip(self.nonfinite, nonfinite=faults.nonfinite, skipped=self.skipped_steps, limit=faults.skip_limit)
        self.skipped_steps += 1
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
