"""Who hangs, and who is gone, among the processes of one training.

Every rank tells the others through the store of torch.distributed how far it is, once a second from a thread with a
connection of its own, and watches them. Where the run makes no progress for `faults.hang_timeout` seconds, each rank prints
one line that names the culprit and ends its process: a collective that waits for a lost peer cannot be interrupted.

Ages are measured by the watcher's own clock, from when it last saw a value change; clocks of machines are not compared.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn, cast

from pivotune.errors import TrainingError
from pivotune.training.distributed import ranks
from pivotune.training.progress import Progress

INTERVAL = 1.0  # seconds between two signs of life
# A process that is busy in a library may keep its thread waiting for a while; this long says that it is not there.
SILENT = 15.0
# After a broken connection: peers that are alive have been heard of since.
_GONE = 4.0
# As long it may take until that is known: on a busy machine the watching thread waits, too.
_GONE_WAIT = 20.0
_BROKEN = re.compile(
    r"connection (closed|reset|refused|was)|broken pipe|socket|peer|nccl|gloo|timed out|remote process|rendezvous",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class RankState:
    """What one rank tells the others.

    Attributes:
        beat: signs of life so far.
        ticks: events of any kind: a micro-batch, a batch scored, a phase begun.
        position: events that every rank has in the same order; a rank that others wait for has fewer.
        phase: what it does, in words, at `step` (optimizer steps, from 1).
        done: it has left the training as it should.
    """

    rank: int
    host: str
    pid: int
    beat: int = 0
    ticks: int = 0
    position: int = 0
    phase: str = "starting"
    step: int = 0
    done: bool = False

    @property
    def place(self) -> str:
        return f"{self.phase} of step {self.step}" if self.step else self.phase

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"


@dataclass(frozen=True)
class Seen:
    """A rank's state and the seconds since its sign of life, and its progress, were seen to change."""

    state: RankState
    silent: float
    idle: float


def find_hang(seen: Sequence[Seen], timeout: float) -> str | None:
    """One line that names who holds the run up; None while some rank made progress in the last `timeout` seconds."""
    running = [view for view in seen if not view.state.done]
    if timeout <= 0 or not running or min(view.idle for view in running) < timeout:
        return None
    head = f"no progress for {timeout:g} s"
    silent = [view for view in running if view.silent >= SILENT]
    if silent:
        names = "; ".join(f"{view.state} gives no sign of life since {view.silent:.0f} s" for view in silent)
        return f"{head}: {names}"
    last = min(view.state.position for view in running)
    behind = [view.state for view in running if view.state.position == last]
    if len(behind) == len(running):
        return f"{head}: all ranks stand at the same place, in {behind[0].place}"
    return f"{head}: " + "; ".join(f"{state} is behind: in {state.place}" for state in behind)


def find_gone(seen: Sequence[Seen]) -> list[RankState]:
    """The ranks that have not been heard of for so long that they cannot be alive, given that others have been."""
    return [view.state for view in seen if not view.state.done and view.silent >= _GONE]


class Liveness:
    """Tells the other ranks how far this one is, and watches them.

    Args:
        store: a store of torch.distributed for this object alone (`Store.clone`), used in its thread only.
        hang_timeout: seconds without progress after which the process ends; 0 for never.
        end: ends the process, given the line; other than by default in tests only.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        hang_timeout: float,
        end: Callable[[str], None] | None = None,
    ) -> None:
        self._store = store
        self._world_size = world_size
        self._timeout = hang_timeout
        self._end = end or end_process
        self._own = RankState(rank=rank, host=socket.gethostname(), pid=os.getpid())
        self._seen: dict[int, Seen] = {}
        self._changed: dict[int, tuple[float, float]] = {}
        self._all_known = False
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)

    def start(self) -> None:
        """Begin to tell and to watch."""
        self._thread.start()

    def close(self, *, done: bool = True) -> None:
        """Leave: the others no longer wait for signs of life; after a failure (not `done`) they miss them."""
        with self._lock:
            self._own = replace(self._own, done=done)
        self._closing.set()
        self._thread.join(timeout=10 * INTERVAL)

    def progress(self, phase: str, step: int, *, common: bool = True) -> None:
        """Something was done. Costs no communication.

        Args:
            common: every rank comes here, as many times.
        """
        with self._lock:
            own = self._own
            self._own = replace(
                own, phase=phase, step=step, ticks=own.ticks + 1, position=own.position + (1 if common else 0)
            )

    def seen(self) -> list[Seen]:
        """All ranks as this one sees them now."""
        with self._lock:
            return list(self._seen.values())

    def told_by(self, progress: Progress) -> Progress:
        """The same progress display; what it shows tells the other ranks, too."""

        @contextmanager
        def telling(title: str, total: int) -> Iterator[Callable[[int], None]]:
            with progress(title, total) as advance:

                def tell(done: int) -> None:
                    self.progress(title, 0, common=False)
                    advance(done)

                tell(0)
                yield tell

        return telling

    def wait_for_gone(self, seconds: float = _GONE_WAIT) -> list[RankState]:
        """The ranks that are gone, after a connection broke; waits until one is known to be, at most `seconds`."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            gone = find_gone(self.seen())
            if gone:
                return gone
            time.sleep(INTERVAL / 4)
        return []

    def _run(self) -> None:
        while True:
            closing = self._closing.is_set()
            self._beat()
            if closing:
                return
            line = find_hang(self.seen(), self._timeout)
            if line is not None:
                self._end(line)
                return
            self._closing.wait(INTERVAL)

    def _beat(self) -> None:
        with self._lock:
            self._own = own = replace(self._own, beat=self._own.beat + 1)
        # Where the store's own process is gone or stands still, everybody else falls silent here.
        with suppress(RuntimeError, ValueError, TypeError):
            self._store.set(_key(own.rank), json.dumps(own.__dict__))
            others = [_key(rank) for rank in range(self._world_size) if rank != own.rank]
            # One question for all of them, once each has spoken.
            known = others if self._all_known else [key for key in others if self._store.check([key])]
            self._all_known = len(known) == len(others)
            for text in self._store.multi_get(known) if known else ():
                self._see(RankState(**json.loads(text)))
        self._see(own)
        self._age()

    def _see(self, state: RankState) -> None:
        now = time.monotonic()
        before = self._seen.get(state.rank)
        beat, progress = self._changed.get(state.rank, (now, now))
        if before is not None and before.state.beat != state.beat:
            beat = now
        if before is not None and before.state.ticks != state.ticks:
            progress = now
        with self._lock:
            self._changed[state.rank] = beat, progress
            self._seen[state.rank] = Seen(state, now - beat, now - progress)

    def _age(self) -> None:
        now = time.monotonic()
        with self._lock:
            for rank, (beat, progress) in self._changed.items():
                self._seen[rank] = Seen(self._seen[rank].state, now - beat, now - progress)


def end_process(line: str) -> NoReturn:
    """Print the line and end the process at once: the training thread is blocked in a collective."""
    print(f"pivotune: stopped: {line}", file=sys.stderr, flush=True)
    with suppress(Exception):
        sys.stdout.flush()
    os._exit(1)


def start_liveness(hang_timeout: float) -> Liveness | None:
    """Watch the ranks of the process group that is initialised; None where there is one process."""
    import torch.distributed as dist

    if ranks.world_size() == 1:
        return None
    store = cast(Any, dist.distributed_c10d._get_default_store()).clone()
    store.set_timeout(timedelta(seconds=5 * INTERVAL))
    liveness = Liveness(store, dist.get_rank(), dist.get_world_size(), hang_timeout)
    liveness.start()
    return liveness


@contextmanager
def watched(hang_timeout: float) -> Iterator[Liveness | None]:
    """Inside, this rank tells the others how far it is and watches them; None where there is one process.

    Raises:
        TrainingError: a peer is gone.
    """
    liveness = start_liveness(hang_timeout)
    try:
        with named_losses(liveness):
            yield liveness
    except BaseException:
        if liveness is not None:
            liveness.close(done=False)
        raise
    if liveness is not None:
        liveness.close()


@contextmanager
def named_losses(liveness: Liveness | None) -> Iterator[None]:
    """A connection that breaks inside becomes one line that names the rank that is gone.

    Raises:
        TrainingError: a peer is gone.
    """
    try:
        yield
    except TrainingError:
        raise
    except (RuntimeError, OSError) as error:
        if liveness is None or not _BROKEN.search(str(error)):
            raise
        gone = liveness.wait_for_gone()
        if not gone:
            # All are there: it was another connection.
            raise
        names = ", ".join(map(str, gone))
        reason = " ".join(str(error).split())[:120]
        raise TrainingError(f"lost: {names} ({reason}); go on with --resume") from error


def _key(rank: int) -> str:
    return f"pivotune/liveness/{rank}"
