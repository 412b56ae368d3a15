"""Program of one rank of two: collective work outside the training step; each rank asserts its own side."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from cases import build

from pivotune.errors import UsageError
from pivotune.training.distributed import ranks
from pivotune.training.resilience.checkpoints import STAGING
from pivotune.training.resilience.counters import TrainingDivergedError
from pivotune.training.resilience.preemption import StoppedBySignalError, StopSignals


def raised_by(function: Any) -> BaseException | None:
    try:
        function()
    except BaseException as error:
        return error
    return None


def fail(error: BaseException) -> None:
    raise error


def one_for_all(rank: int) -> None:
    assert ranks.on_main(lambda: {"from": rank}) == {"from": 0}
    mistake = raised_by(lambda: ranks.on_main(lambda: fail(UsageError("row 3 is empty"))))
    assert isinstance(mistake, UsageError)
    assert str(mistake) == "row 3 is empty"
    assert mistake.reported == (rank == 1)
    failure = raised_by(lambda: ranks.on_main(lambda: fail(KeyError("x"))))
    assert isinstance(failure, KeyError if rank == 0 else ranks.OtherRankError)
    assert rank == 0 or "the main process has failed" in str(failure)


def shared_out(rank: int) -> None:
    assert ranks.world_size() == 2
    assert ranks.rank() == rank
    assert ranks.is_main() == (rank == 0)
    assert ranks.share_out("abcde", "-") == [["a", "c", "e"], ["b", "d", "-"]][rank]
    assert ranks.share_out("", "-") == []
    assert ranks.gather_objects(rank * 10) == [0, 10]


def agreed(rank: int) -> None:
    ranks.agree(lambda: None)
    failure = raised_by(lambda: ranks.agree(lambda: fail(OSError("no room")) if rank == 1 else None))
    assert isinstance(failure, OSError if rank == 1 else ranks.OtherRankError)
    assert rank == 1 or str(failure) == "process 1 has failed: no room"
    # A signal too: the other rank does not wait.
    stopped = raised_by(lambda: ranks.agree(lambda: fail(StoppedBySignalError("SIGTERM")) if rank == 0 else None))
    assert isinstance(stopped, StoppedBySignalError if rank == 0 else ranks.OtherRankError)


def stopped_together(rank: int, folder: Path) -> None:
    """What one rank has seen, a bad loss or a signal, is acted on by both."""
    poisoned = build("tft", folder / "poisoned", 2)
    compute = poisoned.compute_loss
    poisoned.compute_loss = lambda *args, **kwargs: compute(*args, **kwargs) * (math.nan if rank == 1 else 1.0)
    failure = raised_by(poisoned.train)
    assert isinstance(failure, TrainingDivergedError)
    assert "at step 1" in str(failure)
    assert ("in rows of another process" in str(failure)) == (rank == 0)
    signals = StopSignals()
    signals.received = "SIGTERM" if rank == 1 else None
    signalled = build("tft", folder / "signalled", 2, stop_signals=signals)
    stop = raised_by(signalled.train)
    assert isinstance(stop, StoppedBySignalError)
    assert stop.name == ("SIGTERM" if rank == 1 else "a signal to another process")
    assert (folder / "signalled" / "checkpoint-1" / "checksums.json").is_file()


def saved(rank: int, folder: Path) -> None:
    def write(staging: Path) -> None:
        (staging / f"part-{rank}").write_text(str(rank))

    ranks.save_together(folder / "whole", write)
    assert sorted(path.name for path in (folder / "whole").glob("part-*")) == ["part-0", "part-1"]
    # The main process cannot begin: a file stands where the folder should be.
    if rank == 0:
        (folder / "file").write_text("")
    ranks.gather_objects(None)
    failure = raised_by(lambda: ranks.save_together(folder / "file" / "below", write))
    assert isinstance(failure, UsageError if rank == 0 else ranks.OtherRankError)
    assert str(folder / "file") in str(failure)


def left_alone(rank: int, folder: Path) -> None:
    """The second process fails in the middle of writing and is gone; nothing half stays."""

    def broken(staging: Path) -> None:
        (staging / f"part-{rank}").write_text("half")
        if rank == 1:
            raise OSError(28, "No space left on device")

    failure = raised_by(lambda: ranks.save_together(folder / "broken", broken))
    if rank == 1:
        assert isinstance(failure, OSError)
        print("all as promised", flush=True)
        os._exit(0)
    assert isinstance(failure, RuntimeError)
    assert not (folder / "broken").exists()
    assert not (folder / STAGING).exists()


def main(path: str) -> None:
    folder = Path(path)
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    one_for_all(rank)
    shared_out(rank)
    agreed(rank)
    stopped_together(rank, folder)
    saved(rank, folder)
    left_alone(rank, folder)
    print("all as promised", flush=True)
    os._exit(0)
