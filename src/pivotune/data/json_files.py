"""Records of JSON Lines and of JSON lists, one at a time, however long the file is."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from pivotune.data.text_files import BadRecord, NumberedRecords, encoding_fault, not_utf8, open_file, raw_lines
from pivotune.errors import UsageError
from pivotune.text.json_text import RepeatedKeyError, decode_at, json_error, parse_json

_BLANK = object()  # a line without a record
_BYTES_PER_READ = 2**20
# The longest row of a list, as the longest line of JSON Lines: it must fit into memory several times.
_LONGEST_VALUE = 2**28
# JSON Lines in a `.json` file are recognized by their first line. A longer first line is part of a list.
_LONGEST_FIRST_LINE = 2**22
_SPACES = " \t\n\r"
_AFTER_VALUE = frozenset(",:]}" + _SPACES)


def read_jsonl(path: Path) -> NumberedRecords:
    """Yield (line number, record); a line that cannot be read gives a `BadRecord`, a blank line nothing."""
    for number, raw in enumerate(raw_lines(path), start=1):
        record = _parse_line(path, raw, number)
        if record is not _BLANK:
            yield number, record


def _parse_line(path: Path, raw: bytes, number: int) -> Any:
    try:
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        # Without `strip`, so that the column in an error is that of the file.
        return parse_json(line.rstrip("\r\n")) if line.strip() else _BLANK
    except UnicodeDecodeError as error:
        fault = encoding_fault(raw, error)
        whole = UsageError(f"{path}, line {number}: not UTF-8 ({fault}); save the file as UTF-8")
        return BadRecord("is not UTF-8", f" ({fault}); save the file as UTF-8", whole)
    except json.JSONDecodeError as error:
        note = f" (column {error.colno}: {error.msg})"
        return BadRecord("is not valid JSON", note, json_error(path, number, error))
    except RepeatedKeyError as error:
        return _repeated_key(error, f"{path}, line {number}")
    except ValueError as error:
        return BadRecord("is JSON that cannot be read", f" ({error})", json_error(path, number, error))


def _repeated_key(error: RepeatedKeyError, place: str) -> BadRecord:
    return BadRecord("names a key more than once", f" ({error})", UsageError(f"{place}: an object {error}"))


def read_json(path: Path) -> NumberedRecords:
    """Yield (row number, record) of `[{...}, ...]`, `{"data": [{...}, ...]}`, or JSON Lines under this name.

    Other values beside the list are read and ignored. A row that names a key twice gives a `BadRecord`.

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
    opening, has_list = text.next_character(), True
    if opening == "[":
        yield from _items(text)
    elif opening == "{":
        has_list = yield from _list_under_data(text)
    elif opening:
        text.value()
        has_list = False
    if text.next_character():
        raise text.error("Extra data")
    if not has_list:
        raise UsageError(f'{text.path}: holds no list of rows; allowed: [{{...}}, ...] or {{"data": [{{...}}, ...]}}')


def _items(text: _Window) -> Iterator[Any]:
    """Yield the items of the list that begins here."""
    text.take("[")
    if text.next_character() == "]":
        text.take("]")
        return
    while True:
        yield text.value()
        if text.next_character() == "]":
            text.take("]")
            return
        text.take(",")


def _list_under_data(text: _Window) -> Generator[Any, None, bool]:
    """Yield the items of the list under `data` in the object that begins here; return True if there is one."""
    keys: set[str] = set()
    has_list = False
    text.take("{")
    while keys or text.next_character() != "}":
        if text.next_character() != '"':
            raise text.error("Expecting property name enclosed in double quotes")
        key = text.value()
        if key in keys:
            raise UsageError(f"{text.path}: the object that holds the rows {RepeatedKeyError(key)}")
        keys.add(key)
        text.take(":")
        if key == "data" and text.next_character() == "[":
            has_list = True
            yield from _items(text)
        else:
            text.value()
        if text.next_character() == "}":
            break
        text.take(",")
    text.take("}")
    return has_list


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
            while self._place < len(self._text):
                if (character := self._text[self._place]) not in _SPACES:
                    return character
                self._place += 1
            if self._ended:
                return ""
            self._read(_BYTES_PER_READ)

    def take(self, character: str) -> None:
        """Take the next character, which must be this one."""
        if self.next_character() != character:
            raise self.error(f"Expecting '{character}' delimiter")
        self._place += 1

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
            raise not_utf8(self.path, error, 1 + self._decoded) from error
        self._decoded += text.count("\n")
        self._text, self._place = self._text[self._place :] + text, 0

    def _position(self, place: int) -> tuple[int, int]:
        """Return line and column of a place in `_text`, from 1."""
        start = self._text.rfind("\n", 0, place) + 1
        line = 1 + self._line + self._text.count("\n", 0, place)
        return line, 1 + place - start + (self._column if start == 0 else 0)
