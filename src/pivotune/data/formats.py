"""Records from data files: JSON Lines, JSON, CSV, TSV and Parquet, each plain or gzipped, in UTF-8."""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pivotune.errors import UsageError

_GZIP_MAGIC = b"\x1f\x8b"
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_PARQUET_BATCH_ROWS = 1024
# The csv module refuses cells over 131,072 characters by default; a long document is no mistake.
_LONGEST_CELL = 2**30

NumberedRecords = Iterator[tuple[int, Any]]


def read_file(path: Path) -> NumberedRecords:
    """Yield (number, record) for every record of a data file; the number is 1-based.

    JSON Lines are numbered by line (blank lines are passed over but counted), all others by row. JSON Lines, CSV
    and Parquet are streamed; a `.json` file (an array, `{"data": [...]}`, or lines after all) is read whole.

    Raises:
        UsageError: the file is missing, a folder, empty, of unknown type, unreadable, not UTF-8 or malformed.
    """
    _check_file(path)
    reader = _READERS.get(file_type(path))
    if reader is None:
        raise UsageError(f"{path}: unknown file type; allowed: {describe_file_types()}")
    with _reading(path):
        yield from reader(path)


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 text file, plain or gzipped, with their ends; errors as `read_file`."""
    _check_file(path)
    with _reading(path):
        yield from _lines(path)


def file_type(path: Path) -> str:
    """The suffix that tells the format, in lower case and without `.gz`: '.jsonl' for 'Pairs.JSONL.gz'."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_data_file_name(path: Path) -> bool:
    """Whether the name ends like a data file, whether or not it exists."""
    return file_type(path) in _READERS


def numbered_by(path: Path) -> str:
    """The word for a record's number in this file: 'line' for JSON Lines, else 'row'."""
    return "line" if _READERS.get(file_type(path)) is _read_jsonl else "row"


def describe_file_types() -> str:
    return f"{', '.join(_READERS)}, each also with .gz"


def missing_file_error(path: Path) -> UsageError:
    """The error for a path that does not exist, with the nearest name in its folder if there is one."""
    if not path.parent.is_dir():
        return UsageError(f"{path}: no such file, and no folder {path.parent}")
    names = sorted(entry.name for entry in path.parent.iterdir())
    nearest = difflib.get_close_matches(path.name, names, n=1)
    hint = f"; did you mean {path.parent / nearest[0]}?" if nearest else ""
    return UsageError(f"{path}: no such file{hint}")


def _check_file(path: Path) -> None:
    if not path.exists():
        raise missing_file_error(path)
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if is_data_file_name(entry))
        found = f"one of its data files, such as {names[0]}" if names else "a data file; it holds none"
        raise UsageError(f"{path}: is a folder; give {found}")
    if path.is_file() and path.stat().st_size == 0:
        raise UsageError(f"{path}: the file is empty")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what reading and decompressing can raise into one line."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{path}: cannot be read: {reason}") from error


def _open(path: Path) -> io.BufferedIOBase:
    """Open for bytes, decompressed where the content (whatever the name) is gzip."""
    with path.open("rb") as file:
        is_gzip = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    return gzip.open(path, "rb") if is_gzip else path.open("rb")


def _decode(path: Path, raw: bytes, first_line: int = 1) -> str:
    try:
        return raw.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        found = "this looks like UTF-16" if raw.startswith(_UTF16_MARKS) else f"byte 0x{raw[error.start]:02x}"
        raise UsageError(f"{path}, line {line}: not UTF-8 ({found}); save the file as UTF-8") from None


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends, split at \\n only: U+2028 and the like may stand inside a JSON text."""
    with _open(path) as file:
        for number, raw in enumerate(file, start=1):
            yield _decode(path, raw, number)


def _parse_json(path: Path, text: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {first_line + error.lineno - 1}, column {error.colno}"
        raise UsageError(f"{path}, {place}: broken JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of over 4,300 digits; nesting without end
        raise UsageError(f"{path}, line {first_line}: unreadable JSON: {error}") from error


def _read_jsonl(path: Path) -> NumberedRecords:
    for number, line in enumerate(_lines(path), start=1):
        text = line.strip()
        if text:
            # The line as it stands, so that the column in an error is the file's.
            yield number, _parse_json(path, line.rstrip("\r\n"), number)


def _read_json(path: Path) -> NumberedRecords:
    with _open(path) as file:
        text = _decode(path, file.read())
    if not text.strip():
        return
    if _is_json_lines(text):
        records = (record for _, record in _read_jsonl(path))
    else:
        records = _find_array(path, _parse_json(path, text))
    yield from enumerate(records, start=1)


def _is_json_lines(text: str) -> bool:
    """Whether a `.json` file holds one object a line, as many published data sets do."""
    first, _, rest = text.strip().partition("\n")
    if not (first.startswith("{") and rest.strip()):
        return False
    try:
        json.loads(first)
    except ValueError:
        return False
    return True


def _find_array(path: Path, value: Any) -> list[Any]:
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise UsageError(f'{path}: holds no list of rows; allowed: [{{...}}, ...] or {{"data": [{{...}}, ...]}}')
    return rows


def _read_csv(path: Path, delimiter: str = ",") -> NumberedRecords:
    lines = _lines(path)
    # strict: a quote left open is an error with its line, not half the file in one cell.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    previous_limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        header = _check_header(path, next(reader, []))
        cells = (row for row in reader if row)
        for number, row in enumerate(cells, start=1):
            yield number, _as_record(path, header, row, reader.line_num)
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: broken CSV: {error}") from error
    finally:
        csv.field_size_limit(previous_limit)
        lines.close()  # pyright: ignore[reportAttributeAccessIssue]


def _read_tsv(path: Path) -> NumberedRecords:
    return _read_csv(path, delimiter="\t")


def _check_header(path: Path, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    repeated = next((name for name in header if header.count(name) > 1), None)
    if repeated is not None:
        raise UsageError(f"{path}, line 1: the header names the column {repeated!r} more than once")
    return header


def _as_record(path: Path, header: list[str], row: list[str], line: int) -> dict[str, str | None]:
    if len(row) > len(header) and any(row[len(header) :]):
        raise UsageError(f"{path}, line {line}: {len(row)} cells, but the header names {len(header)} columns")
    return dict(zip_longest(header, row[: len(header)]))


def _read_parquet(path: Path) -> NumberedRecords:
    import pyarrow
    import pyarrow.parquet

    with _open(path) as file:
        source = io.BytesIO(file.read()) if isinstance(file, gzip.GzipFile) else file
        try:
            batches = pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=_PARQUET_BATCH_ROWS)
            records = (record for batch in batches for record in batch.to_pylist())
            yield from enumerate(records, start=1)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"{path}: not a readable Parquet file: {reason}") from error


_READERS: dict[str, Callable[[Path], NumberedRecords]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
