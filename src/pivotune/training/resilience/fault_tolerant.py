"""`FaultTolerantTrainer`: non-finite steps, preemption, complete checkpoints, and exact resuming, on top of `Trainer`.

`Trainer` resumes weights, optimizer, schedule, data order and random numbers. This file adds the log window that a
checkpoint cuts through, the patience of early stopping, a due evaluation, and a run that is resumed at its end.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from pivotune.errors import UsageError
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.batching import DataOrder, order_of, resumed_order, save_order
from pivotune.training.distributed import ranks
from pivotune.training.metrics import LogWindow
from pivotune.training.resilience.checkpoint_safety import check_checkpoint
from pivotune.training.resilience.checkpoints import (
    TRAINER_STATE,
    check_states,
    find_checkpoint_damage,
    find_damage,
    own_checkpoint,
    set_newer_aside,
    whole_checkpoint,
)
from pivotune.training.resilience.nonfinite import StepRecord, check_skip
from pivotune.training.resilience.preemption import EvaluationStoppedError, SaveAndStop, StopSignals

logger = logging.getLogger(__name__)

# The private methods of `transformers.Trainer` that are overridden, in this class only, and the reason of each.
OVERRIDDEN = {
    "_get_grad_norm": "no callback sees the gradient's norm, which must be checked before the optimizer changes a weight",
    "_run_epoch": "a run that is resumed at its end would train one step more; an evaluation is left after a signal",
    "_save_checkpoint": "the whole checkpoint is written in a staging folder and renamed, by all ranks together",
    "_get_output_dir": "gives `_save_checkpoint` of `Trainer` the staging folder",
    "_load_best_model": "a damaged best checkpoint, or one of another run, is not loaded",
}


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


class FaultTolerantTrainer(Trainer):
    """A `Trainer` that checks every step, saves and stops after a signal, and resumes exactly.

    Args:
        stop_signals: records signals that ask the training to stop.
        verified_checkpoint: a checkpoint whose checksums the caller has compared already.
        sources: the sources of the training rows, as in `Rows.sources`, to name rows in messages.

    Attributes:
        order: shape of an optimizer step; of a resumed run as it was begun.
        resumed_from: the checkpoint that the training continues from; None for a new one.
    """

    args: DeepSupervisionConfig
    _window: LogWindow  # made by the subclass

    def __init__(
        self,
        *args: Any,
        stop_signals: StopSignals | None = None,
        verified_checkpoint: Path | None = None,
        sources: Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._step = StepRecord(sources)
        self.order: DataOrder = order_of(self.args, self._train_batch_size)
        self.counters = PivotuneCounters(self)
        self.save_and_stop = SaveAndStop(self, stop_signals)
        self.resumed_from: Path | None = None
        self._verified = verified_checkpoint
        self._staging: Path | None = None

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train; see `Trainer.train`.

        Args:
            resume_from_checkpoint: True resumes from the newest checkpoint whose checksums match, a path from that one.
                Newer checkpoints are renamed.

        Raises:
            UsageError: the checkpoint is damaged, or would run code, or its steps hold other rows than this run's.
        """
        checkpoint = ranks.on_main(lambda: self._choose_checkpoint(resume_from_checkpoint))
        now = order_of(self.args, self._train_batch_size)
        self.order = now if checkpoint is None else ranks.on_main(lambda: resumed_order(checkpoint, now))
        if self.order != now:
            logger.warning("%s was begun with %s; this run has %s, in the same order", checkpoint, self.order, now)
        self.resumed_from = checkpoint
        if checkpoint is not None:
            ranks.on_main(lambda: set_newer_aside(self._folder, checkpoint))
            # Of the starting weights, which the run before has evaluated.
            self.args.eval_on_start = False
        # `PivotuneCounters` restores them in every run; `Trainer` would make new callbacks.
        self.args.restore_callback_states_from_checkpoint = False
        # Behind the callbacks whose decisions they change.
        for callback in (self.counters, self.save_and_stop):
            self.pop_callback(callback)
            self.add_callback(callback)
        output = super().train(resume_from_checkpoint if checkpoint is None else str(checkpoint), **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def _choose_checkpoint(self, resume_from: Any) -> Path | None:
        """Return the checkpoint to resume from, checked before anything reads it; DeepSpeed reads states by itself."""
        if resume_from is True:
            checkpoint = whole_checkpoint(self._folder)
        elif isinstance(resume_from, (str, os.PathLike)):
            checkpoint = Path(resume_from)
            problem = None if checkpoint == self._verified else find_checkpoint_damage(checkpoint)
            if problem is not None:
                raise UsageError(f"{checkpoint} is damaged: {problem}; resume from another checkpoint")
        else:
            return None
        if checkpoint is not None:
            check_states(checkpoint)
            check_checkpoint(checkpoint)
        return checkpoint

    # ---- steps ----

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run one micro-batch forward and backward; its loss is checked once per optimizer step."""
        self._window.start()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step.add_loss(loss)
        self.counters.add_loss(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Also find non-finite losses and signals on all ranks, with one wait for the device."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        losses = self._step.bad_losses()
        flags = self._sum_over_ranks(torch.stack([losses, losses.new_tensor(float(self.save_and_stop.received))]))
        # A sharded norm is put together; DeepSpeed may have none.
        norm = 0.0 if grad_norm is None else getattr(grad_norm, "full_tensor", lambda: grad_norm)()
        found = torch.cat([flags, torch.as_tensor(norm, dtype=flags.dtype, device=flags.device).reshape(1)])
        bad_losses, stopping, value = found.tolist()
        self.save_and_stop.stopping = stopping > 0
        # In float16 overflow is normal: its scaler skips such steps and lowers its scale.
        is_scaled = getattr(self.accelerator, "scaler", None) is not None
        is_finite = not bad_losses and (is_scaled or math.isfinite(value))
        step = self.state.global_step + 1
        self.counters.nonfinite = None if is_finite else self._step.describe(step, value, in_loss=bad_losses > 0)
        return grad_norm

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, on every rank."""
        return cast(Tensor, self.accelerator.reduce(values, reduction="sum"))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log means over the steps that were done, and the number of skipped steps."""
        self.counters.complete(logs)
        super().log(logs, start_time)

    # ---- epochs and evaluations ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without drawing from the training's random numbers: a resumed run may evaluate once more."""
        device = self.args.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return super().evaluate(*args, **kwargs)

    def begin_resumed(self, control: TrainerControl) -> None:
        """Evaluate first if the process before had no time to, and train no step if the run is at its end."""
        at_end = self.state.global_step >= self.state.max_steps or any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
        )
        if self.save_and_stop.evaluation_due:
            try:
                metrics = self._evaluate(None, None)
            except EvaluationStoppedError:
                raise self.save_and_stop.stopped_at(self.state.global_step) from None
            self._determine_best_metric(metrics=metrics, trial=None)
            self.state.best_model_checkpoint = self._best_checkpoint()
            self.save_and_stop.evaluation_due = False
        control.should_training_stop = control.should_training_stop or at_end

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_training_stop:
            return
        try:
            super()._run_epoch(*args, **kwargs)
        except EvaluationStoppedError:
            step, lines = self.state.global_step, self.state.log_history
            # One language may be evaluated already; the resumed run evaluates both.
            self.state.log_history = [
                line for line in lines if line["step"] != step or not any(name.startswith("eval_") for name in line)
            ]
            self.save_and_stop.evaluation_due = True
            self._save_checkpoint(cast(nn.Module, self.model_wrapped), None)
            raise self.save_and_stop.stopped_at(step) from None

    # ---- checkpoints ----

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _check_folder(self) -> None:
        """Refuse to make a run folder that has vanished again: its content is gone."""
        if not self._folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self._folder))

    def _best_checkpoint(self, *, saving: Path | None = None) -> str | None:
        """Return the checkpoint of the best step if it exists or is being saved."""
        best = self._folder / f"checkpoint-{self.state.best_global_step}"
        exists = best == saving or ranks.on_main(best.is_dir)
        return str(best) if exists else self.state.best_model_checkpoint

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = self._folder / f"checkpoint-{self.state.global_step}"
        ranks.agree(self._check_folder)
        best = self._best_checkpoint(saving=folder)
        self.counters.collect()

        def write(staging: Path) -> None:
            self._staging = staging.parent
            try:
                super(FaultTolerantTrainer, self)._save_checkpoint(model, trial)
            finally:
                self._staging = None
            # `Trainer` has looked for the best one in the staging folder.
            self.state.best_model_checkpoint = best
            if self.args.should_save:
                self.state.save_to_json(str(staging / TRAINER_STATE))
                save_order(self.order, staging)

        ranks.save_together(folder, write)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(folder.parent),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=best,
                # By step: a deletion that was cut short makes an old checkpoint look new.
                use_mtime=False,
            )

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model without `training_args.bin`, a pickle that nothing here reads."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            (Path(output_dir or str(self.args.output_dir)) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _load_best_model(self) -> None:
        named = self.state.best_model_checkpoint
        best, problem = ranks.on_main(lambda: self._check_best(named))
        # Otherwise the last checkpoints would be deleted in favour of one that cannot be used.
        self.state.best_model_checkpoint = None if best is None else str(best)
        if best is None:
            logger.warning("the best checkpoint %s is %s; the last weights are kept", named, problem)
            return
        super()._load_best_model()

    def _check_best(self, named: str | None) -> tuple[Path | None, str]:
        """Return the best checkpoint if it can be loaded, or None and the reason."""
        best = own_checkpoint(named, self._folder)
        if best is None:
            return None, "not one of this run"
        damage = find_damage(best)
        if damage is not None:
            return None, f"damaged ({damage})"
        check_checkpoint(best)
        return best, ""
