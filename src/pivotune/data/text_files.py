"""Bytes and lines of data files, plain or gzipped, in UTF-8."""

from __future__ import annotations

import codecs
import gzip
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pivotune.errors import UsageError

_GZIP_MAGIC = b"\x1f\x8b"
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# A line must fit into memory several times; a file without line ends has another type than its name.
_LONGEST_LINE = 2**28

NumberedRecords = Iterator[tuple[int, Any]]


@dataclass(frozen=True, slots=True)
class BadRecord:
    """Takes the place of a record that cannot be read, where the next record of the file can.

    Attributes:
        reason: the same for all records with this problem, to count them by ("is not valid JSON").
        note: details of this record, such as the column.
        error: the whole message, with the file and the line.
    """

    reason: str
    note: str
    error: UsageError


def open_file(path: Path) -> io.BufferedIOBase:
    """Open for bytes, decompressed where the content is gzip under any name."""
    with path.open("rb") as file:
        is_gzip = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    return gzip.open(path, "rb") if is_gzip else path.open("rb")


def not_utf8(path: Path, error: UnicodeDecodeError, first_line: int) -> UsageError:
    """Return the error for bytes that cannot be decoded and begin in `first_line`."""
    line = first_line + error.object.count(b"\n", 0, error.start)
    fault = encoding_fault(error.object, error)
    return UsageError(f"{path}, line {line}: not UTF-8 ({fault}); save the file as UTF-8")


def encoding_fault(raw: bytes, error: UnicodeDecodeError) -> str:
    """Name the byte that is not UTF-8, or the likely encoding."""
    return "this looks like UTF-16" if raw.startswith(_UTF16_MARKS) else f"byte 0x{raw[error.start]:02x}"


def raw_lines(path: Path) -> Iterator[bytes]:
    """Yield lines with their ends, split at \\n only: U+2028 and the like may stand inside a JSON text."""
    with open_file(path) as file:
        number = 0
        while raw := file.readline(_LONGEST_LINE + 1):
            number += 1
            if len(raw) > _LONGEST_LINE:
                size = f"{_LONGEST_LINE // 2**20} MiB" if _LONGEST_LINE >= 2**20 else f"{_LONGEST_LINE} bytes"
                raise UsageError(f"{path}, line {number}: longer than {size}; does the file have the type of its name?")
            yield raw


def text_lines(path: Path) -> Iterator[str]:
    """Yield decoded lines with their ends."""
    for number, raw in enumerate(raw_lines(path), start=1):
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(path, error, number) from None
