"""What makes a training survive faults: steps that are no numbers, signals, checkpoints from which it goes on exactly.

`Trainer` resumes weights, optimizer, schedule, data order and random numbers. Here is what it leaves out: the log window
that a checkpoint cuts through, evaluations and log lines that are due at the same step as the checkpoint, and a run that
is resumed at its very end.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState

from pivotune.errors import TrainingError
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.distributed import ranks
from pivotune.training.distributed.liveness import Liveness
from pivotune.training.metrics import LogWindow
from pivotune.training.resilience.nonfinite import StepRecord
from pivotune.training.resilience.preemption import StoppedBySignalError, StopSignals

logger = logging.getLogger(__name__)
# Under this name the counters stand in a checkpoint's `trainer_state.json`, among the states of callbacks.
_COUNTERS = "PivotuneCounters"


class TrainingDivergedError(TrainingError):
    """A loss or the gradient is not a finite number; the weights are those of the step before."""


class _EvaluationCutError(Exception):
    """A signal came in the middle of an evaluation."""


class FaultTolerantTrainer(Trainer):
    """A `Trainer` that checks every step, leaves when asked to, and resumes as if it had never stopped.

    Attributes:
        stop_signals: where signals are remembered; None where nobody listens.
        liveness: told of every phase; None where there is one process.
    """

    args: DeepSupervisionConfig
    _window: LogWindow

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Transformers before 5.19 has none: its summary is of all steps without being told.
        self._initial_global_step = 0
        self.stop_signals: StopSignals | None = None
        self.liveness: Liveness | None = None
        self._step = StepRecord()
        self._leaving = False  # a signal has come, on whatever rank
        self._reported_step = -1
        self._evaluation_due = False
        self._random_state: Tensor | None = None  # after an evaluation that was made up for
        self._may_cut_evaluation = False
        self._skipped_steps = 0
        self._window_steps = self._window_skipped = 0  # since the last log line
        self._seconds_before = 0.0
        self._began = time.time()

    # ---- steps ----

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch forward and backward; whether it was finite is asked once per optimizer step."""
        self._tell("forward and backward")
        self._window.start()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step.add_loss(loss)
        return loss

    def _tell(self, phase: str) -> None:
        if self.liveness is not None:
            self.liveness.progress(phase, self.state.global_step + 1)

    def _begin_step(self) -> None:
        """Remember what a skipped step must leave as it was."""
        self._step.clear()
        self._window.mark()
        self._loss_before = self._tr_loss.clone()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm; the last thing that is computed before the optimizer touches the weights.

        Raises:
            TrainingDivergedError: a loss of this step or its gradient is not finite, on any rank, and steps are not to be
                skipped, or too many were.
        """
        self._tell("the gradient's norm")
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        bad_losses, leaving, norm = self._ask_all_ranks(grad_norm)
        self._leaving = leaving
        self._window_steps += 1
        # Overflow is the everyday business of float16: its scaler skips such steps and lowers its scale.
        scaled = getattr(self.accelerator, "scaler", None) is not None
        if bad_losses or not (scaled or math.isfinite(norm)):
            self._refuse_step(model, norm, in_loss=bad_losses)
        return grad_norm

    def _ask_all_ranks(self, grad_norm: Any) -> tuple[bool, bool, float]:
        """Whether a loss is not finite and whether a signal has come, anywhere, and the norm: one wait for the device."""
        losses = self._step.bad_losses()
        stop = self.stop_signals is not None and self.stop_signals.received is not None
        flags = self._sum_over_ranks(torch.stack([losses, losses.new_tensor(float(stop))]))
        # A sharded norm is put together; DeepSpeed may have none.
        norm = 0.0 if grad_norm is None else getattr(grad_norm, "full_tensor", lambda: grad_norm)()
        found = torch.cat([flags, torch.as_tensor(norm, dtype=flags.dtype, device=flags.device).reshape(1)])
        bad_losses, leaving, value = found.tolist()
        return bad_losses > 0, leaving > 0, value

    def _refuse_step(self, model: nn.Module, norm: float, *, in_loss: bool) -> None:
        found = self._step.describe(self.state.global_step + 1, norm, in_loss=in_loss)
        if self.args.faults.nonfinite == "stop":
            raise TrainingDivergedError(
                f"{found}; the weights are those of the step before; look at these rows, lower training.learning_rate or "
                "the supervision weights, or set faults.nonfinite: skip"
            )
        self._skipped_steps += 1
        if self._skipped_steps > self.args.faults.skip_limit:
            raise TrainingDivergedError(
                f"{found}; {self.args.faults.skip_limit} steps were skipped before, the limit of faults.skip_limit; look "
                "at these rows, or lower training.learning_rate or the supervision weights"
            )
        logger.warning("%s: step skipped (%d of at most %d)", found, self._skipped_steps, self.args.faults.skip_limit)
        self._window_skipped += 1
        self._window.rollback()
        self._tr_loss.copy_(self._loss_before)
        # An optimizer passes over what has no gradient: neither weights nor moments change, and the schedule goes on.
        model.zero_grad()

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return cast(Tensor, self.accelerator.reduce(values, reduction="sum"))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Means over the steps that were done, and how many were skipped."""
        if "loss" in logs:
            if self._window_skipped:
                done = self._window_steps - self._window_skipped
                logs["loss"] = logs["loss"] * self._window_steps / done if done else math.nan
            if self._skipped_steps:
                logs["skipped_steps"] = self._skipped_steps
            self._window_steps = self._window_skipped = 0
        if "train_loss" in logs and self._skipped_steps:
            # Transformers before 5.19 divides by all steps.
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step - self._skipped_steps, 1)
        super().log(logs, start_time)

    # ---- what happens between steps ----

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """One epoch; none where the run is resumed at its end: `Trainer` would do one step more."""
        self._restore_counters()
        self._reported_step = -1
        if self.state.global_step >= self.state.max_steps or self._is_out_of_patience(kwargs["resume_from_checkpoint"]):
            self.control.should_training_stop = True
            return
        if self._evaluation_due:
            # As in the process before: with the random numbers of the checkpoint, which go on from here.
            self._load_rng_state(kwargs["resume_from_checkpoint"])
            self._evaluate_if_due()
            self._random_state = torch.get_rng_state()
            if self.control.should_training_stop:
                return
        super()._run_epoch(*args, **kwargs)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)
            self._random_state = None

    def _is_out_of_patience(self, resumed_from: str | None) -> bool:
        """Whether the evaluation before the checkpoint was the last that early stopping allows."""
        return resumed_from is not None and any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
        )

    def _load_callback_state(self) -> None:
        """Give callbacks back what they counted (the patience of early stopping); `Trainer` does so on request only."""
        super()._load_callback_state()
        if self.args.restore_callback_states_from_checkpoint:
            return
        for callback in self.callback_handler.callbacks:
            kept = self._kept_states.get(type(callback).__name__)
            if isinstance(callback, ExportableState) and isinstance(kept, dict):
                # Of a file that travels: only what the callback itself would keep.
                for name in callback.state()["attributes"].keys() & kept.get("attributes", {}).keys():
                    setattr(callback, name, kept["attributes"][name])

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Log, evaluate, save, in this order, and leave after a signal.

        Called after every step, and again after the last one of an epoch. A checkpoint that is due after that step waits
        for the second call: a run resumed from it would never come to what that call logs and evaluates.

        Raises:
            StoppedBySignalError: a signal has come, and the checkpoint is saved. An evaluation that was due is left to the
                resumed run, for the time is short.
        """
        is_first = self.state.global_step != self._reported_step
        self._reported_step = self.state.global_step
        comes_again = is_first and self._ends_epoch()
        wait = comes_again and self.control.should_save
        if self._leaving and self.control.should_evaluate:
            self._evaluation_due, self.control.should_evaluate = True, False
        leave = self._leaving and not comes_again
        self.control.should_save = leave or (self.control.should_save and not comes_again)
        try:
            with self._evaluation_may_be_cut():
                super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except _EvaluationCutError:
            self._evaluation_due = self._leaving = True
            if not comes_again:
                leave = True
                self._save_checkpoint(model, trial)
        if leave:
            raise self._stopped(trial)
        if wait:
            self.control.should_save = True

    def _ends_epoch(self) -> bool:
        control = self.control
        return control.should_training_stop or control.should_epoch_stop or float(self.state.epoch or 0).is_integer()

    def _stopped(self, trial: Any) -> StoppedBySignalError:
        name = self.stop_signals.received if self.stop_signals is not None else None
        checkpoint = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        return StoppedBySignalError(name or "a signal to another process", str(checkpoint))

    @contextmanager
    def _evaluation_may_be_cut(self) -> Iterator[None]:
        """An evaluation may leave in its middle with everything as it was before; ranks would have to agree on where."""
        state, lines = torch.get_rng_state(), None
        self._may_cut_evaluation = self.accelerator.num_processes == 1
        try:
            yield
        except _EvaluationCutError:
            torch.set_rng_state(state)
            lines = [line for line in self.state.log_history if not _is_evaluation_of(line, self.state.global_step)]
            self.state.log_history = lines
            raise
        finally:
            self._may_cut_evaluation = False

    def _leave_evaluation_if_stopped(self) -> None:
        """To be called before every batch of an evaluation."""
        self._tell("evaluation")
        if self._may_cut_evaluation and self.stop_signals is not None and self.stop_signals.received is not None:
            raise _EvaluationCutError

    def _evaluate_if_due(self) -> None:
        """The evaluation that the process before had no time for."""
        if self._evaluation_due:
            metrics = self._evaluate(None, None)
            self._determine_best_metric(metrics=metrics, trial=None)
            # Its checkpoint was saved before.
            self.state.best_model_checkpoint = self._best_checkpoint(Path(self._get_output_dir(None)))
            self._evaluation_due = False

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        """The summary is of the whole run, whatever processes did parts of it."""
        self._restore_counters()
        self._evaluate_if_due()
        self._initial_global_step += self._skipped_steps
        output = super()._finalize_training(trial, num_train_samples, start_time - self._seconds_before)
        return output._replace(training_loss=output.metrics["train_loss"])

    # ---- checkpoints ----

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Without `training_args.bin`: it is a pickle, and nobody reads it."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            (Path(cast(str, output_dir or self.args.output_dir)) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _best_checkpoint(self, folder: Path, *, saving: Path | None = None) -> str | None:
        """The checkpoint of the best step where it is in the run's folder, or is being saved."""
        best = folder / f"checkpoint-{self.state.best_global_step}"
        is_there = best == saving or ranks.on_main(best.is_dir)
        return str(best) if is_there else self.state.best_model_checkpoint

    @property
    def _kept_states(self) -> dict[str, Any]:
        """States of callbacks by name; Transformers declares what it makes the dictionary from."""
        return cast(dict[str, Any], self.state.stateful_callbacks)

    @contextmanager
    def _counters_in_state(self) -> Iterator[None]:
        """Inside, the trainer's state holds what a resumed run goes on counting from."""
        self._tell("saving a checkpoint")
        processes = self.accelerator.num_processes
        self._kept_states[_COUNTERS] = {
            "loss_sum": self._sum_over_ranks(self._tr_loss.clone()).item() / processes,
            "total_loss": self._total_loss_scalar,
            "last_logged_step": self._globalstep_last_logged,
            "initial_step": self._initial_global_step,
            "seconds": self._seconds_before + time.time() - self._began,
            "skipped_steps": self._skipped_steps,
            "window_steps": self._window_steps,
            "window_skipped": self._window_skipped,
            "evaluation_due": self._evaluation_due,
            "window": self._window.state(self._sum_over_ranks),
        }
        try:
            yield
        finally:
            self._kept_states.pop(_COUNTERS, None)

    def _restore_counters(self) -> None:
        """Once, after `Trainer` has read a checkpoint; a checkpoint of another program has none."""
        counters = self._kept_states.pop(_COUNTERS, None)
        if counters is None:
            return
        self._began, self._seconds_before = time.time(), counters["seconds"]
        self._total_loss_scalar = counters["total_loss"]
        self._globalstep_last_logged = counters["last_logged_step"]
        self._initial_global_step = counters["initial_step"]
        self._skipped_steps = counters["skipped_steps"]
        self._window_steps, self._window_skipped = counters["window_steps"], counters["window_skipped"]
        self._evaluation_due = counters["evaluation_due"]
        self._tr_loss.fill_(counters["loss_sum"])
        # Sums over ranks go on on one of them.
        self._window.restore(counters["window"], counts=self.accelerator.is_main_process)


def _is_evaluation_of(line: dict[str, Any], step: int) -> bool:
    return line.get("step") == step and any(name.startswith("eval_") for name in line)
