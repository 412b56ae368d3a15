"""`FaultTolerantTrainer`: non-finite steps, preemption, complete checkpoints, and exact resuming, on top of `Trainer`.

`Trainer` resumes weights, optimizer, schedule, data order and random numbers. This file adds the log window that a
checkpoint cuts through, the patience of early stopping, a due evaluation, and a run that is resumed at its end.
"""

from __future__ import annotations

import errno
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer, TrainerControl
from transformers.trainer import TRAINING_ARGS_NAME
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
from pivotune.training.resilience.counters import PivotuneCounters, StepRecord
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
