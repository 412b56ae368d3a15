"""The rows of a JSON list, one at a time: `[{...}, ...]` or `{"data": [{...}, ...]}`, however long the file is."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from pivotune.data.text_files import not_utf8, open_file
from pivotune.errors import UsageError
from pivotune.text.json_text import RepeatedKeyError, broken_json, decode_at, unreadable_json

_PIECE = 2**20
# As long as a line of JSON Lines: a row must fit into memory several times.
_LONGEST_VALUE = 2**28
# JSON Lines in a file of another name are known by their first line. A list may have but one, too long to be read whole.
_LONGEST_FIRST_LINE = 2**22
_SPACES = " \t\n\r"
_AFTER_VALUE = frozenset(",:]}" + _SPACES)


def stream_rows(path: Path) -> Iterator[Any]:
    """The rows of a list; objects that name a key twice are `RepeatedKeys` in them.

    What stands beside the list in an object is read and left out.

    Raises:
        UsageError: the text holds no list, is not JSON or not UTF-8, or is JSON that Python cannot read.
    """
    with open_file(path) as file:
        text = _Window(path, file)
        opening, has_list = text.next_character(), True
        if opening == "[":
            yield from _items(text)
        elif opening == "{":
            has_list = yield from _list_in_object(text)
        elif opening:
            text.value()
            has_list = False
        if text.next_character():
            raise text.error("Extra data")
        if not has_list:
            raise UsageError(f'{path}: holds no list of rows; allowed: [{{...}}, ...] or {{"data": [{{...}}, ...]}}')


def starts_with_line_of_object(path: Path) -> bool:
    """Whether the first line is an object of its own and more follows: JSON Lines, as many published data sets are.

    Raises:
        UsageError: the beginning is not UTF-8.
    """
    with open_file(path) as file:
        text = _Window(path, file)
        if text.next_character() != "{":
            return False
        line = text.line(_LONGEST_FIRST_LINE)
        if line is None or not text.next_character():
            return False
        try:
            return not line[decode_at(line, 0)[1] :].strip()
        except ValueError:
            return False


def _items(text: _Window) -> Iterator[Any]:
    """The items of the list whose bracket comes next."""
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


def _list_in_object(text: _Window) -> Generator[Any, None, bool]:
    """The items of the list under `data`; returns whether there is one."""
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
    """The part of a file's text that is not used yet, read piece by piece."""

    def __init__(self, path: Path, file: io.BufferedIOBase) -> None:
        self.path, self._file = path, file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._place, self._ended = "", 0, False
        # Lines and characters of a line before the text that is there, and lines that were decoded.
        self._line = self._column = self._decoded = 0

    def next_character(self) -> str:
        """The next one that is no space, which stays; empty at the end."""
        while True:
            while self._place < len(self._text):
                if (character := self._text[self._place]) not in _SPACES:
                    return character
                self._place += 1
            if self._ended:
                return ""
            self._read(_PIECE)

    def take(self, character: str) -> None:
        """Go past a character that must come next."""
        if self.next_character() != character:
            raise self.error(f"Expecting '{character}' delimiter")
        self._place += 1

    def value(self) -> Any:
        """The next value, whole."""
        self.next_character()
        more = _PIECE
        while True:
            last = self._ended or len(self._text) - self._place > _LONGEST_VALUE
            try:
                value, end = decode_at(self._text, self._place)
            except json.JSONDecodeError as error:
                if last:
                    raise broken_json(self.path, *self._position(error.pos), error.msg) from error
            except ValueError as error:
                raise unreadable_json(self.path, self._position(self._place)[0], error) from error
            else:
                # A number goes on behind the end of what was read: `1` may be `1.5`, and so may `1.`.
                if last or self._text[end : end + 1] in _AFTER_VALUE:
                    self._place = end
                    return value
            self._read(more)
            more *= 2

    def line(self, most: int) -> str | None:
        """The rest of the line, and go past it; None where it is longer than `most` characters or so."""
        while "\n" not in self._text[self._place :] and not self._ended:
            if len(self._text) > most:
                return None
            self._read(_PIECE)
        line, end, _ = self._text[self._place :].partition("\n")
        self._place += len(line) + len(end)
        return line

    def error(self, problem: str) -> UsageError:
        """What is wrong at this place."""
        return broken_json(self.path, *self._position(self._place), problem)

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
        """Line and column of a place in the text that is there, from 1."""
        start = self._text.rfind("\n", 0, place) + 1
        line = 1 + self._line + self._text.count("\n", 0, place)
        return line, 1 + place - start + (self._column if start == 0 else 0)
