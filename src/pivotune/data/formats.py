"""Records from data files: JSON Lines, JSON, CSV, TSV and Parquet, each plain or gzipped, in UTF-8."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import IO, cast

from pivotune.data.lazy import writing_temporary_data
from pivotune.data.rows import RowError
from pivotune.data.text_files import NumberedRecords, open_file, read_json, read_jsonl, text_lines
from pivotune.errors import UsageError
from pivotune.text.json_text import shown

_PARQUET_BATCH_ROWS = 1024
# The csv module refuses cells of over 131,072 characters by default. A long document may be longer; but a quote left open
# makes one cell of the rest of the file, which takes 4 bytes a character.
_LONGEST_CELL = 2**24
# Parquet pages are read through a buffer: without it a column of a whole row group, often of the whole file, is read.
_PARQUET_BUFFER = 2**20


def read_file(path: Path, *, keep_bad: bool = False) -> NumberedRecords:
    """Yield (number, record) for every record of a data file, without reading it whole.

    JSON Lines are numbered by line from 1 (blank lines are skipped but counted), all others by row.

    Args:
        keep_bad: yield a `RowError` instead of raising where one record cannot be read and the next one can.

    Raises:
        UsageError: the file is missing, a folder, empty, of unknown type, unreadable, not UTF-8 or malformed.
    """
    with reading(path):
        reader = _READERS.get(file_type(path))
        if reader is None:
            raise UsageError(f"{path}: unknown file type; allowed: {describe_file_types()}")
        for number, record in reader(path):
            if isinstance(record, RowError) and record.error and not keep_bad:
                raise record.error
            yield number, record


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 text file, plain or gzipped, with their ends; errors as `read_file`."""
    with reading(path):
        yield from text_lines(path)


def file_type(path: Path) -> str:
    """Return the suffix of the format, in lower case and without `.gz`: '.jsonl' for 'Pairs.JSONL.gz'."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def is_data_file_name(path: Path) -> bool:
    return file_type(path) in _READERS


def numbered_by(path: Path) -> str:
    """Return the word for a record's number in this file: 'line' for JSON Lines, else 'row'."""
    return "line" if _READERS.get(file_type(path)) is read_jsonl else "row"


def source_of(number: int, sources: Mapping[str, int]) -> tuple[str, int]:
    """Return the source of a row, and the row's number there.

    Args:
        number: the row's number; numbers go on from one source to the next.
        sources: each source, in order, with the last number before it.
    """
    first, *others = sources
    name = [first, *(other for other in others if sources[other] < number)][-1]
    return name, number - sources[name]


def row_name(number: int, sources: Mapping[str, int]) -> int | str:
    """Return the number of a row, and with several sources its source too: `b.jsonl:3`; see `source_of`."""
    return number if len(sources) < 2 else "{}:{}".format(*source_of(number, sources))


def describe_file_types(*more: str) -> str:
    return f"{', '.join((*_READERS, *more))}, each also with .gz"


def missing_file_error(path: Path) -> UsageError:
    """Return the error for a path that does not exist, with the nearest name in its folder if there is one."""
    if not path.parent.is_dir():
        return UsageError(f"{path}: no such file, and no folder {path.parent}")
    names = sorted(entry.name for entry in path.parent.iterdir())
    hints = [f"; did you mean {path.parent / name}?" for name in difflib.get_close_matches(path.name, names, n=1)]
    return UsageError(f"{path}: no such file{''.join(hints)}")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Refuse what is no file, and turn the errors of reading and decompressing into one line."""
    if not path.exists():
        raise missing_file_error(path)
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if is_data_file_name(entry))
        found = f"one of its data files, such as {names[0]}" if names else "a data file; it holds none"
        raise UsageError(f"{path}: is a folder; give {found}")
    if path.is_file() and path.stat().st_size == 0:
        raise UsageError(f"{path}: the file is empty")
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{path}: cannot be read: {reason}") from error


def _read_csv(path: Path, delimiter: str = ",") -> NumberedRecords:
    lines = text_lines(path)
    # strict: a quote left open is an error, not the rest of the file in one cell.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    previous_limit = csv.field_size_limit(_LONGEST_CELL)
    number, first_line = 0, 1
    try:
        header = [cell.strip() for cell in next(reader, [])]
        if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), "")):
            name = "tabs; name the file .tsv" if other == "\t" else f"{other!r}; write commas or tabs"
            raise UsageError(f"{path}, line 1: the header has one column: the cells are separated by {name}")
        _refuse_repeated_columns(header, f"{path}, line 1: the header")
        # A row with line ends in its cells, or with a quote left open, ends far below the line to be named.
        first_line = reader.line_num + 1
        for row in reader:
            number += bool(row)
            if any(row[len(header) :]):
                fault = f"{len(row)} cells, but the header names {len(header)} columns"
                error = UsageError(f"{path}, line {first_line}: {fault}")
                yield number, RowError("", "has more cells than the header", f" ({fault})", error)
            elif row:
                yield number, dict(zip_longest(header, row[: len(header)]))
            first_line = reader.line_num + 1
    except csv.Error as error:
        faults = {
            "new-line character": "a carriage return that ends no line; put quotes around the cell, or save the file with "
            "\\n line ends",
            "unexpected end of data": "a quote is left open",
            "field limit": f"a cell has more than {_LONGEST_CELL:,} characters; is a quote left open?",
        }
        fault = next((fault for part, fault in faults.items() if part in str(error)), str(error))
        raise UsageError(f"{path}, line {first_line}: broken CSV: {fault}") from error
    finally:
        csv.field_size_limit(previous_limit)
        lines.close()  # pyright: ignore[reportAttributeAccessIssue]


def _refuse_repeated_columns(names: list[str], place: str) -> None:
    repeated = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if repeated is not None:
        raise UsageError(f"{place} names the column {shown(repeated)} more than once")


def _read_parquet(path: Path) -> NumberedRecords:
    import pyarrow
    import pyarrow.parquet

    with open_file(path) as file, _seekable(file) as source:
        try:
            table = pyarrow.parquet.ParquetFile(source, buffer_size=_PARQUET_BUFFER)
            _refuse_repeated_columns(table.schema_arrow.names, f"{path}: the schema")
            batches = table.iter_batches(batch_size=_PARQUET_BATCH_ROWS)
            yield from enumerate((record for batch in batches for record in batch.to_pylist()), start=1)
        except UsageError:
            raise
        # pyarrow's own errors, and the errors of Python's types: text that is not UTF-8, dates, endless structures.
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"{path}: not a readable Parquet file: {reason}") from error


@contextmanager
def _seekable(file: io.BufferedIOBase) -> Iterator[IO[bytes]]:
    """Copy a gzipped file to a temporary one: Parquet is read from its end, gzip only from its beginning."""
    if not isinstance(file, gzip.GzipFile):
        yield cast(IO[bytes], file)
        return
    with writing_temporary_data():
        unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - entered below
    with unpacked:
        while piece := file.read(_PARQUET_BUFFER):
            with writing_temporary_data():
                unpacked.write(piece)
        with writing_temporary_data():
            unpacked.seek(0)
        yield unpacked


_READERS: dict[str, Callable[[Path], NumberedRecords]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
}
