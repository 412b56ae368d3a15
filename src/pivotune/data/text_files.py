"""Lines, JSON Lines and JSON lists of text files in UTF-8, plain or gzipped, one at a time, however long the file is."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pivotune.data.rows import RowError
from pivotune.errors import UsageError
from pivotune.text.json_text import RepeatedKeyError, decode_at, json_error, parse_json

_GZIP_MAGIC = b"\x1f\x8b"
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# A line, or a row of a JSON list, must fit into memory several times; a file without line ends has another type than its
# name.
_LONGEST_LINE = _LONGEST_VALUE = 2**28
_BYTES_PER_READ = 2**20
# JSON Lines in a `.json` file are recognized by their first line. A longer first line is part of a list.
_LONGEST_FIRST_LINE = 2**22
# The first line of a list of rows that goes on in the next line.
_LIST_BEGINS = re.compile(r"\s*\[\s*(\{|$)")
_BLANKS = re.compile(r"[ \t\n\r]*")
_AFTER_VALUE = frozenset(",:]} \t\n\r")

# A `RowError` with its `error` takes the place of a record that cannot be read, where the next one of the file can.
NumberedRecords = Iterator[tuple[int, Any]]


def open_file(path: Path) -> io.BufferedIOBase:
    """Open for bytes, decompressed where the content is gzip under any name."""
    with path.open("rb") as file:
        is_gzip = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    return gzip.open(path, "rb") if is_gzip else path.open("rb")


def _encoding_note(raw: bytes, error: UnicodeDecodeError) -> str:
    """Name the byte that is not UTF-8, or the likely encoding."""
    fault = "this looks like UTF-16" if raw.startswith(_UTF16_MARKS) else f"byte 0x{raw[error.start]:02x}"
    return f" ({fault}); save the file as UTF-8"


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes, str]]:
    """Yield numbered lines with their encoding, split at \\n only: U+2028 and the like may stand inside a JSON text."""
    with open_file(path) as file:
        number = 0
        while raw := file.readline(_LONGEST_LINE + 1):
            number += 1
            if len(raw) > _LONGEST_LINE:
                limit = f"{_LONGEST_LINE / 2**20:g} MiB"
                raise UsageError(
                    f"{path}, line {number}: longer than {limit}; does the file have the type of its name?"
                )
            if number == 1 and 4 * raw.count(b"\0") > len(raw) and not raw.startswith(_UTF16_MARKS):
                # Without a mark at the beginning it would pass as UTF-8.
                raise UsageError(f"{path}: not UTF-8 (this looks like UTF-16); save the file as UTF-8")
            yield number, raw, "utf-8-sig" if number == 1 else "utf-8"


def text_lines(path: Path) -> Iterator[str]:
    """Yield decoded lines with their ends."""
    for number, raw, encoding in _raw_lines(path):
        try:
            yield raw.decode(encoding)
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}, line {number}: not UTF-8{_encoding_note(raw, error)}") from None


def read_jsonl(path: Path) -> NumberedRecords:
    """Yield (line number, record); a line that cannot be read gives a `RowError`, a blank line nothing."""
    is_list = UsageError(f"{path}: holds a JSON list, not one object a line; name it .json")
    first, count = "", 0
    for number, raw, encoding in _raw_lines(path):
        try:
            line = raw.decode(encoding)
            if not line.strip():
                continue
            first, count = first or line, count + 1
            # Without `strip`, so that the column in an error is that of the file.
            record = parse_json(line.rstrip("\r\n"))
        except UnicodeDecodeError as error:
            note = _encoding_note(raw, error)
            record = RowError("", "is not UTF-8", note, UsageError(f"{path}, line {number}: not UTF-8{note}"))
        except json.JSONDecodeError as error:
            if count == 1 and _LIST_BEGINS.match(first):
                raise is_list from None
            note = f" (column {error.colno}: {error.msg})"
            record = RowError("", "is not valid JSON", note, json_error(path, number, error))
        except RepeatedKeyError as error:
            record = _repeated_key(error, f"{path}, line {number}")
        except ValueError as error:
            record = RowError("", "is JSON that cannot be read", f" ({error})", json_error(path, number, error))
        yield number, record
    if count == 1 and first.lstrip().startswith("["):
        raise is_list


def _repeated_key(error: RepeatedKeyError, place: str) -> RowError:
    return RowError("", "names a key more than once", f" ({error})", UsageError(f"{place}: an object {error}"))


def read_json(path: Path) -> NumberedRecords:
    """Yield (row number, record) of `[{...}, ...]`, `{"data": [{...}, ...]}`, or JSON Lines under this name.

    Other values beside the list are read and ignored. A row that names a key twice gives a `RowError`.

    Raises:
        UsageError: the text holds no list, is not JSON or not UTF-8, or is JSON that Python cannot read.
    """
    if _holds_json_lines(path):
        yield from enumerate((record for _, record in read_jsonl(path)), start=1)
        return
    with open_file(path) as file:
        for number, row in enumerate(_list_rows(_Window(path, file)), start=1):
            yield number, _repeated_key(row, f"{path}, row {number}") if isinstance(row, RepeatedKeyError) else row


def _holds_json_lines(path: Path) -> bool:
    """Return True if the first line is an object of its own and more lines follow, as in many published data sets."""
    with open_file(path) as file:
        lines = (line for line in iter(lambda: file.readline(_LONGEST_FIRST_LINE), b"") if line.strip())
        first, second = next(lines, b""), next(lines, b"")
    try:
        return bool(second) and isinstance(json.loads(first.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _list_rows(text: _Window) -> Iterator[Any]:
    """Yield the items of the list that is the text, or that its object holds under `data`."""
    opening = text.next_character()
    has_list = opening in ("", "[")
    if opening == "[":
        yield from text.items()
    elif opening == "{":
        keys: set[str] = set()
        for _ in text.members("{", "}"):
            if text.next_character() != '"':
                raise text.error("Expecting property name enclosed in double quotes")
            key = text.value()
            if key in keys:
                raise UsageError(f"{text.path}: the object that holds the rows {RepeatedKeyError(key)}")
            keys.add(key)
            text.take(":")
            if key == "data" and text.next_character() == "[":
                has_list = True
                yield from text.items()
            else:
                text.value()
    elif opening:
        text.value()
    if text.next_character():
        raise text.error("Extra data")
    if not has_list:
        raise UsageError(f'{text.path}: holds no list of rows; allowed: [{{...}}, ...] or {{"data": [{{...}}, ...]}}')


class _Window:
    """The unread part of a file's text, which grows as the file is read piece by piece."""

    def __init__(self, path: Path, file: io.BufferedIOBase) -> None:
        self.path, self._file = path, file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._place, self._ended = "", 0, False
        # Lines and characters of a line before `_text`, and lines that were decoded.
        self._line = self._column = self._decoded = 0

    def next_character(self) -> str:
        """Skip white space and return the next character without taking it; '' at the end."""
        while True:
            self._place = _BLANKS.match(self._text, self._place).end()  # pyright: ignore[reportOptionalMemberAccess]
            if self._ended or self._place < len(self._text):
                return self._text[self._place : self._place + 1]
            self._read(_BYTES_PER_READ)

    def take(self, character: str) -> None:
        """Take the next character, which must be this one."""
        if self.next_character() != character:
            raise self.error(f"Expecting '{character}' delimiter")
        self._place += 1

    def members(self, opening: str, closing: str) -> Iterator[None]:
        """Take the brackets and commas of the list or object that begins here; the caller takes each member."""
        self.take(opening)
        if self.next_character() != closing:
            yield
            while self.next_character() != closing:
                self.take(",")
                yield
        self.take(closing)

    def items(self) -> Iterator[Any]:
        """Take the list that begins here and yield its items."""
        for _ in self.members("[", "]"):
            yield self.value()

    def value(self) -> Any:
        """Take the next value, reading until it is whole."""
        self.next_character()
        more = _BYTES_PER_READ
        while True:
            last = self._ended or len(self._text) - self._place > _LONGEST_VALUE
            try:
                value, end = decode_at(self._text, self._place)
            except json.JSONDecodeError as error:
                if last:
                    line, column = self._position(error.pos)
                    raise json_error(self.path, line, error, column) from error
            except ValueError as error:
                raise json_error(self.path, self._position(self._place)[0], error) from error
            else:
                # A number may go on behind the text that was read: `1` may be `1.5`, and so may `1.`.
                if last or self._text[end : end + 1] in _AFTER_VALUE:
                    self._place = end
                    return value
            self._read(more)
            more *= 2

    def error(self, problem: str) -> UsageError:
        line, column = self._position(self._place)
        return UsageError(f"{self.path}, line {line}, column {column}: broken JSON: {problem}")

    def _read(self, size: int) -> None:
        self._line, self._column = (number - 1 for number in self._position(self._place))
        piece = self._file.read(size)
        self._ended = not piece
        try:
            text = self._decoder.decode(piece, self._ended)
        except UnicodeDecodeError as error:
            line = 1 + self._decoded + error.object.count(b"\n", 0, error.start)
            note = _encoding_note(error.object, error)
            raise UsageError(f"{self.path}, line {line}: not UTF-8{note}") from error
        self._decoded += text.count("\n")
        self._text, self._place = self._text[self._place :] + text, 0

    def _position(self, place: int) -> tuple[int, int]:
        """Return line and column of a place in `_text`, from 1."""
        start = self._text.rfind("\n", 0, place) + 1
        line = 1 + self._line + self._text.count("\n", 0, place)
        return line, 1 + place - start + (self._column if start == 0 else 0)
