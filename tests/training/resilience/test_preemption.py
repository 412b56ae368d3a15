from __future__ import annotations

import signal
import subprocess
import threading

import pytest
from torch.utils.data import DataLoader

from pivotune.training.resilience.preemption import (
    SIGNALS,
    StoppedBySignalError,
    StopSignals,
    ignore_signals_in_workers,
)


def send(number: int) -> None:
    """To this process; Python acts on it before the next statement."""
    signal.raise_signal(number)
    signal.sigpending()


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_of_training_it_raises_at_once(number):
    before = signal.getsignal(number)
    with pytest.raises(StoppedBySignalError) as raised, StopSignals() as signals:
        send(number)
    assert raised.value.name == signals.received == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_inside_of_training_it_is_remembered_and_raised_at_the_end():
    received = []

    def train(signals: StopSignals) -> None:
        with signals.deferred():
            # A second one changes nothing.
            for number in (signal.SIGTERM, signal.SIGUSR1):
                send(number)
                received.append(signals.received)

    with StopSignals() as signals, pytest.raises(StoppedBySignalError):
        train(signals)
    assert received == ["SIGTERM", "SIGTERM"]


def test_a_second_one_does_not_raise_again():
    with StopSignals() as signals:
        with pytest.raises(StoppedBySignalError):
            send(signal.SIGTERM)
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
        # One that was lost on its way is raised at the next place that asks.
        with pytest.raises(StoppedBySignalError):
            signals.check()


def test_a_forked_process_leaves_the_signal_to_its_parent():
    with StopSignals() as signals:
        signals._pid += 1
        send(signal.SIGTERM)
        assert signals.received is None


def test_other_threads_install_nothing():
    before = [signal.getsignal(number) for number in SIGNALS]
    found = []

    def enter() -> None:
        with StopSignals():
            found.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == before


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="a process cannot be told who sent a signal")
def test_a_data_worker_ends_for_its_parent_alone():
    loader = DataLoader(list(range(8)), num_workers=1, prefetch_factor=1, worker_init_fn=ignore_signals_in_workers())
    batches = iter(loader)
    next(batches)  # it has begun
    (worker,) = batches._workers
    for number in SIGNALS:
        subprocess.run(["kill", f"-{number:d}", str(worker.pid)], check=True)
    assert [int(batch) for batch in batches] == list(range(1, 8))
    worker.join()
    assert worker.exitcode == 0

    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers
    worker.terminate()
    worker.join()
    assert worker.exitcode == 0


def test_a_data_worker_begins_as_it_was_told():
    loader = DataLoader([0], num_workers=1, worker_init_fn=ignore_signals_in_workers(_refuse))
    with pytest.raises(ValueError, match="worker 0 refused"):
        next(iter(loader))


def _refuse(worker_id: int) -> None:
    raise ValueError(f"worker {worker_id} refused")
