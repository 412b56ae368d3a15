"""Strict JSON: an object that names a key twice is an error and does not silently keep the last value."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pivotune.errors import UsageError


class RepeatedKeyError(ValueError):
    """An object names `key` more than once."""

    def __init__(self, key: str) -> None:
        super().__init__(f"names the key {shown(key)} more than once")


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        json.JSONDecodeError: it is not JSON.
        RepeatedKeyError: an object names a key twice.
        ValueError: a number of over 4,300 digits, or lists and objects that are nested too deeply.
    """
    return _shallow(_STRICT.decode, text)


def decode_at(text: str, place: int) -> tuple[Any, int]:
    """Return the value that begins at a place of the text, and the place of its end; errors as `parse_json`.

    A `RepeatedKeyError` is returned as the value, because the text behind it can still be read.
    """
    try:
        return _shallow(_STRICT.raw_decode, text, place)
    except RepeatedKeyError as error:
        return error, _shallow(json.JSONDecoder().raw_decode, text, place)[1]


def json_error(path: Path, line: int, error: ValueError, column: int = 0) -> UsageError:
    """Return the message for a text that is not JSON (with `column`), or that is JSON which Python cannot read."""
    if isinstance(error, json.JSONDecodeError):
        return UsageError(f"{path}, line {line}, column {column or error.colno}: broken JSON: {error.msg}")
    return UsageError(f"{path}, line {line}: unreadable JSON: {error}")


def shown(name: object, length: int = 60) -> str:
    """Quote a name from a data file for a message, cut where it is long."""
    text = name if isinstance(name, str) else type(name).__name__
    return repr(text if len(text) <= length else f"{text[:length]}...")


def _shallow(decode: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return decode(*arguments)
    except RecursionError as error:
        raise ValueError("lists or objects stand within each other too deeply") from error


def _object_without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise RepeatedKeyError(key)
        found[key] = value
    return found


_STRICT = json.JSONDecoder(object_pairs_hook=_object_without_repeated_keys)
