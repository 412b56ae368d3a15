"""Signals that ask a training to stop: SIGTERM, and SIGUSR1 as Slurm sends it before a job ends (`--signal=USR1@120`).

Inside the training loop a signal is only remembered: the trainer finishes its optimizer step, saves a checkpoint and
leaves. Everywhere else (preparation, scoring, saving the model) it raises at once; what is half written is not in place.
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

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StoppedBySignalError(BaseException):
    """A signal asked to stop. No `Exception`, so that no code in between takes it for a failure of its own."""

    def __init__(self, name: str, checkpoint: str | None = None) -> None:
        super().__init__(name)
        self.name = name
        self.checkpoint = checkpoint  # saved on leaving


class StopSignals:
    """Handlers of `SIGNALS`, installed inside the context and replaced by the earlier ones when it is left.

    Outside the main thread, where Python knows no handlers, the context does nothing.

    Attributes:
        received: name of the first signal; later ones change nothing.
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
        """Inside, a signal is only remembered; one that nobody has acted on raises at the end."""
        self._deferred = True
        try:
            self.check()
            yield
        finally:
            self._deferred = False
        self.check()

    def check(self) -> None:
        """Raise where a signal was received: one raised inside a destructor is lost on its way."""
        if self.received is not None:
            raise StoppedBySignalError(self.received)

    def _handle(self, number: int, frame: Any) -> None:
        # Child processes inherit the handlers, and a job's signals go to all its processes: their parent stops them.
        if os.getpid() != self._pid or self.received is not None:
            return
        self.received = signal.Signals(number).name
        if not self._deferred:
            raise StoppedBySignalError(self.received)


def spare_workers(loader: Any) -> Any:
    """The same data loader, whose workers leave a job's signals to their parent.

    They do not keep its handlers: torch's own, for SIGTERM, ends a worker, and with it the step that is to be finished.
    """
    # Accelerate's loaders wrap the one that starts the workers.
    inner = getattr(loader, "base_dataloader", loader)
    inner.worker_init_fn = partial(_begin_worker, inner.worker_init_fn)
    return loader


def _begin_worker(begin: Callable[[int], Any] | None, worker_id: int) -> None:
    # Where a process cannot be told who sent a signal (macOS, Windows) it could not be ended by its parent any more.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_end_for_parent, name="signals", daemon=True).start()
    if begin is not None:
        begin(worker_id)


def _end_for_parent() -> None:
    """torch ends a worker that does not leave by itself with SIGTERM."""
    parent = getattr(multiprocessing.parent_process(), "pid", None)
    while True:
        received = signal.sigwaitinfo(SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)
