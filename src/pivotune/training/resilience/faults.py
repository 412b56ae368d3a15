"""Faults of the machine in one line: what happened, what is kept, how to go on."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pivotune.errors import TrainingError, UsageError
from pivotune.training.resilience.checkpoints import NO_ROOM, kept, write_advice

_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? ?([\d, ]+)\)(?:[^.]*signal: (\w+))?")


@contextmanager
def explained_faults(folder: Path) -> Iterator[None]:
    """Faults inside as one line that names the run's last good checkpoint; everything else passes as it is.

    Raises:
        UsageError: the disk is full or cannot be written.
        TrainingError: the run's folder has vanished, or a data worker has died.
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
    """The fault as an exception whose message is one line; None where it is not known."""
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
    return None


def _is_inside(error: OSError, folder: Path) -> bool:
    """Whether the fault is about the run's folder; a full disk is, whoever meets it."""
    if error.errno in (*NO_ROOM, errno.EROFS):
        return True
    return error.filename is not None and Path(str(error.filename)).resolve().is_relative_to(folder.resolve())
