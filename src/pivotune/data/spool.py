"""Data that is too large to hold: written once to a temporary place, read from there as often as needed.

Temporary files lie in the system's folder for them, which `TMPDIR` changes, and are gone when the process ends.
"""

from __future__ import annotations

import tempfile
import weakref
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

from pivotune.errors import UsageError

# Small data never reaches the disk.
_BYTES_IN_MEMORY = 8 * 2**20
# Items are read together up to this size, when all of them are read.
_BYTES_PER_READ = 2**20


@contextmanager
def writing_temporary_data() -> Iterator[None]:
    """Turn a full disk, or a folder that cannot be written, into one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"{tempfile.gettempdir()}: temporary data cannot be written ({reason}); make room there, or set TMPDIR to a "
            "folder with more"
        ) from error


class Spool:
    """Items of bytes in the order they were appended; in memory while they are few, then in a file without a name.

    Memory grows by 8 bytes an item. All items are appended before the first is read.
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_BYTES_IN_MEMORY)  # noqa: SIM115 - closed by the finalizer
        self._ends = array("Q", [0])
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, item: bytes) -> None:
        """Add an item at the end.

        Raises:
            UsageError: it cannot be written.
        """
        with writing_temporary_data():
            self._file.write(item)
        self._ends.append(self._ends[-1] + len(item))

    def read(self, index: int) -> bytes:
        """The item at a place that exists."""
        with writing_temporary_data():  # what is not on disk yet is written now
            self._file.seek(self._ends[index])
            return self._file.read(self._ends[index + 1] - self._ends[index])

    def read_all(self) -> Iterator[bytes]:
        """All items, in order."""
        first = 0
        while first < len(self):
            stop = first + 1
            while stop < len(self) and self._ends[stop + 1] - self._ends[first] <= _BYTES_PER_READ:
                stop += 1
            yield from self._read_together(first, stop)
            first = stop

    def _read_together(self, first: int, stop: int) -> list[bytes]:
        start = self._ends[first]
        with writing_temporary_data():
            self._file.seek(start)
            block = self._file.read(self._ends[stop] - start)
        return [block[self._ends[place] - start : self._ends[place + 1] - start] for place in range(first, stop)]
