"""One process at a time in a run folder. The operating system lets go of the lock when its process dies, however."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from pivotune.errors import UsageError

logger = logging.getLogger(__name__)
LOCK = ".lock"
# The data workers of a killed process may hold its files open until they notice, which takes them up to 5 seconds.
WAIT_SECONDS = 6.0


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock inside.

    Raises:
        UsageError: another process holds it, or it is a link.
    """
    path = folder / LOCK
    if path.is_symlink():
        # What it points to is not ours to write to.
        raise UsageError(f"output_dir: {path} is a link to {path.readlink()}; remove it")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=WAIT_SECONDS)
    except Timeout as error:
        raise UsageError(
            f"output_dir: {folder} is in use{_owner(path)}; wait for it or choose another folder"
        ) from error
    except (OSError, NotImplementedError) as error:
        # Some network file systems know no locks: better without than not at all.
        logger.warning("%s cannot be locked (%s): see to it that no other process trains there", folder, error)
        yield
        return
    try:
        with suppress(OSError):
            path.write_text(f"{os.getpid()} {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def check_unlocked(folder: Path) -> None:
    """Refuse a folder in which another process trains."""
    if (folder / LOCK).is_file() or (folder / LOCK).is_symlink():
        with run_lock(folder):
            pass


def _owner(path: Path) -> str:
    try:
        pid, host = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return ""
    return f" by process {pid} on {host}"
