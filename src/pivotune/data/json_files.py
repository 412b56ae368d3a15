"""Records from JSON Lines and JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pivotune.data.json_stream import starts_with_line_of_object, stream_rows
from pivotune.data.text_files import BadRecord, NumberedRecords, encoding_fault, raw_lines
from pivotune.errors import UsageError
from pivotune.text.json_text import RepeatedKeyError, broken_json, find_repeated_key, parse_json, unreadable_json

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
    """The rows of a list; those that name a key twice as `BadRecord`. JSON Lines under this name are read as such."""
    if starts_with_line_of_object(path):
        yield from enumerate((record for _, record in read_jsonl(path)), start=1)
        return
    for number, row in enumerate(stream_rows(path), start=1):
        key = find_repeated_key(row)
        yield number, row if key is None else _repeated(str(RepeatedKeyError(key)), f"{path}, row {number}")


def _json_error(path: Path, error: ValueError, line: int) -> UsageError:
    if isinstance(error, json.JSONDecodeError):
        return broken_json(path, line, error.colno, error.msg)
    return unreadable_json(path, line, error)
