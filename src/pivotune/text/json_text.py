"""JSON as data files hold it, read strictly: a key that an object names twice is an error, not the last value."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pivotune.errors import UsageError


class RepeatedKeyError(ValueError):
    """An object names `key` more than once."""

    def __init__(self, key: str) -> None:
        super().__init__(f"names the key {shown(key)} more than once")


class RepeatedKeys(dict):
    """An object that names `key` more than once; it holds the last value of each key."""

    key: str = ""


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        json.JSONDecodeError: it is not JSON.
        RepeatedKeyError: an object names a key twice.
        ValueError: a number of over 4,300 digits, or lists and objects within each other without end.
    """
    with _depth_told():
        return _STRICT.decode(text)


def decode_at(text: str, place: int) -> tuple[Any, int]:
    """The value that begins at a place of the text, and where it ends; objects that name a key twice are `RepeatedKeys`.

    Raises:
        json.JSONDecodeError: there is none.
        ValueError: as `parse_json`.
    """
    with _depth_told():
        return _MARKING.raw_decode(text, place)


def find_repeated_key(value: Any) -> str | None:
    """The key that some object within a value of `decode_at` names twice; None where there is none."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, RepeatedKeys):
            return found.key
        if isinstance(found, dict):
            waiting.extend(found.values())
        elif isinstance(found, list):
            waiting.extend(found)
    return None


def broken_json(path: Path, line: int, column: int, problem: str) -> UsageError:
    """A text in a file that is no JSON."""
    return UsageError(f"{path}, line {line}, column {column}: broken JSON: {problem}")


def unreadable_json(path: Path, line: int, error: ValueError) -> UsageError:
    """A text in a file that is JSON, and more than Python can read."""
    return UsageError(f"{path}, line {line}: unreadable JSON: {error}")


def shown(name: object, length: int = 60) -> str:
    """A name from a data file between quotes for a message, cut where it is long."""
    text = name if isinstance(name, str) else f"{type(name).__name__}"
    return repr(text if len(text) <= length else f"{text[:length]}...")


@contextmanager
def _depth_told() -> Iterator[None]:
    try:
        yield
    except RecursionError as error:
        raise ValueError("lists or objects stand within each other too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RepeatedKeyError(_first_repeated(key for key, _ in pairs))
    return found


def _marked_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    marked = RepeatedKeys(found)
    marked.key = _first_repeated(key for key, _ in pairs)
    return marked


def _first_repeated(keys: Iterable[str]) -> str:
    seen: set[str] = set()
    return next(key for key in keys if key in seen or seen.add(key))


_STRICT = json.JSONDecoder(object_pairs_hook=_object)
_MARKING = json.JSONDecoder(object_pairs_hook=_marked_object)
