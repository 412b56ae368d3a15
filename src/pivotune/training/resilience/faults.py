"""Faults of the machine as one line: the fault, the checkpoint that is kept, and the way to go on."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pivotune.errors import TrainingError, UsageError
from pivotune.training.distributed import ranks
from pivotune.training.resilience.checkpoints import DISK_FULL, kept, write_advice

_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? ?([\d, ]+)\)(?:[^.]*signal: (\w+))?")
# Messages of gloo, NCCL and torch's store about a rank that is gone or that a collective waited for in vain.
_LOST_RANK = re.compile(
    r"gloo|nccl|connection (closed|reset|refused|was)|broken pipe|timed out waiting|remote process|recvValue|TCPStore",
    re.IGNORECASE,
)


@contextmanager
def explained_faults(folder: Path) -> Iterator[None]:
    """Turn a known fault into one line that names the run's last good checkpoint; other errors pass unchanged.

    Raises:
        UsageError: the disk is full or not writable.
        TrainingError: the run's folder has vanished, a data worker has died, or another rank is lost.
    """
    try:
        yield
    except (TrainingError, UsageError):
        raise
    except (OSError, RuntimeError) as error:
        explained = explain(error, folder)
        if explained is None:
            raise
        raise explained from error


def explain(error: OSError | RuntimeError, folder: Path) -> Exception | None:
    """Return a known fault as an exception with a message of one line, or None."""
    if isinstance(error, OSError) and not folder.is_dir():
        return TrainingError(
            f"output_dir: {folder} has vanished during the run; what it held is gone, start again with the same command"
        )
    if isinstance(error, OSError) and error.errno is not None and _is_inside(error, folder):
        where = error.filename or folder
        return UsageError(
            f"{where}: cannot be written ({error.strerror}); {kept(folder)}; {write_advice(error)} and go on with --resume"
        )
    if worker := _WORKER.search(str(error)):
        killed = f" by {worker[2]}" if worker[2] else ""
        return TrainingError(
            f"a data worker (process {worker[1].strip()}) was killed{killed}, often for lack of memory; {kept(folder)}; "
            "lower training.dataloader_num_workers or free memory, and go on with --resume"
        )
    if ranks.world_size() > 1 and _LOST_RANK.search(str(error)):
        # gloo begins with its own source file.
        reason = re.sub(r"^\[[^]]*:\d+\] ", "", " ".join(str(error).split())).partition(". ")[0][:160]
        timed_out = ", with a longer faults.hang_timeout if that rank was only slow" if "imed out" in reason else ""
        return TrainingError(
            f"lost the connection to another rank ({reason}); {kept(folder)}; go on with --resume{timed_out}"
        )
    return None


def _is_inside(error: OSError, folder: Path) -> bool:
    """Return True for an error about the run's folder; a full disk always is."""
    if error.errno in (*DISK_FULL, errno.EROFS):
        return True
    return error.filename is not None and Path(str(error.filename)).resolve().is_relative_to(folder.resolve())
