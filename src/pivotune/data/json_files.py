"""Records from JSON Lines and JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pivotune.data.json_text import (
    RepeatedKeyError,
    RepeatedKeys,
    find_repeated_key,
    parse_json,
    parse_json_marked,
)
from pivotune.data.text_files import BadRecord, NumberedRecords, decode_text, encoding_fault, open_file, raw_lines
from pivotune.errors import UsageError

# What is found on a line without a record.
_BLANK = object()


def read_jsonl(path: Path) -> NumberedRecords:
    for number, raw in enumerate(raw_lines(path), start=1):
        record = _read_json_line(path, raw, number)
        if record is not _BLANK:
            yield number, record


def _read_json_line(path: Path, raw: bytes, number: int) -> Any:
    """The record of a line, a `BadRecord`, or `_BLANK`."""
    try:
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        # The line as it stands, so that the column in an error is the file's.
        return parse_json(line.rstrip("\r\n")) if line.strip() else _BLANK
    except UnicodeDecodeError as error:
        fault = encoding_fault(raw, error)
        whole = UsageError(f"{path}, line {number}: not UTF-8 ({fault}); save the file as UTF-8")
        return BadRecord("is not UTF-8", f" ({fault}); save the file as UTF-8", whole)
    except json.JSONDecodeError as error:
        return BadRecord("is not valid JSON", f" (column {error.colno}: {error.msg})", _json_error(path, error, number))
    except RepeatedKeyError as error:
        return _repeated(str(error), f"{path}, line {number}")
    except ValueError as error:
        return BadRecord("is JSON that cannot be read", f" ({error})", _json_error(path, error, number))


def _repeated(problem: str, place: str) -> BadRecord:
    return BadRecord("names a key more than once", f" ({problem})", UsageError(f"{place}: an object {problem}"))


def read_json(path: Path) -> NumberedRecords:
    with open_file(path) as file:
        text = decode_text(path, file.read())
    if _is_json_lines(text):
        del text
        yield from enumerate((record for _, record in read_jsonl(path)), start=1)
    elif text.strip():
        yield from enumerate(_read_array(path, text), start=1)


def _read_array(path: Path, text: str) -> Iterator[Any]:
    """The rows of a JSON text, those that name a key twice as `BadRecord`."""
    try:
        value = parse_json_marked(text)
    except ValueError as error:
        raise _json_error(path, error) from error
    for number, row in enumerate(_find_array(path, value), start=1):
        key = find_repeated_key(row)
        yield row if key is None else _repeated(str(RepeatedKeyError(key)), f"{path}, row {number}")


def _is_json_lines(text: str) -> bool:
    """Whether a `.json` file holds one object a line, as many published data sets do."""
    first, _, rest = text.strip().partition("\n")
    if not (first.startswith("{") and rest.strip()):
        return False
    try:
        parse_json(first)
    except RepeatedKeyError:
        return True
    except ValueError:
        return False
    return True


def _find_array(path: Path, value: Any) -> list[Any]:
    if isinstance(value, RepeatedKeys):
        raise UsageError(f"{path}: the object that holds the rows {RepeatedKeyError(value.key)}")
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise UsageError(f'{path}: holds no list of rows; allowed: [{{...}}, ...] or {{"data": [{{...}}, ...]}}')
    return rows


def _json_error(path: Path, error: ValueError, first_line: int = 1) -> UsageError:
    if isinstance(error, json.JSONDecodeError):
        place = f"line {first_line + error.lineno - 1}, column {error.colno}"
        return UsageError(f"{path}, {place}: broken JSON: {error.msg}")
    return UsageError(f"{path}, line {first_line}: unreadable JSON: {error}")
