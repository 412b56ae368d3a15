"""Preemption: SIGTERM, and SIGUSR1 as Slurm sends it before a job ends (`--signal=USR1@120`), save a checkpoint and stop.

Inside the training loop a signal is only recorded: the step is finished, a checkpoint saved, and the training left.
Outside of it (preparation, scoring, saving the model) a signal raises at once; half-written folders are not in place.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StoppedBySignalError(BaseException):
    """A signal has stopped the training. No `Exception`, so that no code in between handles it as a failure.

    Attributes:
        checkpoint: the one that was saved on leaving, or None.
    """

    def __init__(self, name: str, checkpoint: str | None = None) -> None:
        super().__init__(name)
        self.name = name
        self.checkpoint = checkpoint


class EvaluationStoppedError(Exception):
    """A signal has come in the middle of an evaluation."""


class StopSignals:
    """Handlers of `SIGNALS`, installed inside the context and replaced by the earlier ones at its end.

    Outside the main thread, where Python has no handlers, the context does nothing.

    Attributes:
        received: name of the first signal, or None; later signals change nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._deferred = False
        self._earlier: dict[int, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record a signal inside the block; raise at its end if the block has not acted on it."""
        self._deferred = True
        try:
            self.check()
            yield
        finally:
            self._deferred = False
        self.check()

    def check(self) -> None:
        """Raise if a signal was received: one that is raised inside a destructor is lost."""
        if self.received is not None:
            raise StoppedBySignalError(self.received)

    def _handle(self, number: int, frame: Any) -> None:
        # Child processes inherit the handlers, and a job's signals reach all its processes: the parent stops its children.
        if os.getpid() != self._pid or self.received is not None:
            return
        self.received = signal.Signals(number).name
        if not self._deferred:
            raise StoppedBySignalError(self.received)


class SaveAndStop(TrainerCallback, ExportableState):
    """Decide when a checkpoint is saved: after a signal, and at the end of an epoch after the epoch's evaluation.

    - After a signal the step is finished, a checkpoint is saved and `StoppedBySignalError` raised. A due evaluation is left
      to the resumed run.
    - `Trainer` logs, evaluates and saves after every step, and once more after the last step of an epoch. A checkpoint that
      is due at that step waits for the second time: a run resumed from it would never log and evaluate the epoch.

    Attributes:
        signals: received signals; None if nobody listens.
        stopping: a signal has come on any rank; set by the trainer once per step.
        evaluation_due: the resumed run has to evaluate first.
    """

    def __init__(self, trainer: Any, signals: StopSignals | None) -> None:
        self.signals = signals
        self.stopping = False
        self.evaluation_due = False
        self._trainer = trainer
        self._waits = False

    @property
    def received(self) -> bool:
        """A signal has come on this rank."""
        return self.signals is not None and self.signals.received is not None

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"evaluation_due": self.evaluation_due}}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.stopping = False
        if state.global_step > 0:
            self._trainer.begin_resumed(control)
        else:
            self.evaluation_due = False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._save_if_stopping(control)
        ends_epoch = control.should_training_stop or control.should_epoch_stop or float(state.epoch or 0).is_integer()
        self._waits = control.should_save and ends_epoch
        control.should_save = control.should_save and not ends_epoch

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._save_if_stopping(control)
        control.should_save = control.should_save or self._waits
        self._waits = False

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Several ranks would have to agree on the batch: they finish the evaluation.
        if self.received and self._trainer.is_in_train and self._trainer.accelerator.num_processes == 1:
            raise EvaluationStoppedError

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stopping:
            raise self.stopped_at(state.global_step)

    def stopped_at(self, step: int) -> StoppedBySignalError:
        """Return the error that reports the signal and the checkpoint of this step."""
        name = self.signals.received if self.signals is not None else None
        checkpoint = os.path.join(str(self._trainer.args.output_dir), f"checkpoint-{step}")
        return StoppedBySignalError(name or "a signal to another process", checkpoint)

    def _save_if_stopping(self, control: TrainerControl) -> None:
        if self.stopping:
            self.evaluation_due = self.evaluation_due or control.should_evaluate
            control.should_evaluate, control.should_save = False, True


def ignore_signals_in_workers(begin: Callable[[int], None] | None = None) -> Callable[[int], None]:
    """Return a `worker_init_fn` that calls `begin` and leaves a job's signals to the parent process.

    torch's own handler of SIGTERM would end a worker, and with it the step that is to be finished.
    """
    return partial(_begin_worker, begin)


def _begin_worker(begin: Callable[[int], None] | None, worker_id: int) -> None:
    # Without sigwaitinfo (macOS, Windows) a worker cannot see the sender, and its parent could not end it any more.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_end_for_parent, name="signals", daemon=True).start()
    if begin is not None:
        begin(worker_id)


def _end_for_parent() -> None:
    """End the worker at its parent's SIGTERM, with which torch ends a worker that does not leave by itself."""
    parent = getattr(multiprocessing.parent_process(), "pid", None)
    while True:
        received = signal.sigwaitinfo(SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)
