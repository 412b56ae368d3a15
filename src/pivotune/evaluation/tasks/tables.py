"""Records of benchmark files: tables with or without a header, JSON, and the Hub's rows, each with its place for messages.

A publisher's file is found by `choose_split` and read by `read_table`, `read_objects` or `read_hub`, which give the same
`Record`s: fields under one set of names, whatever the file calls them, and errors that name file and line.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pivotune.data.formats import numbered_by, read_file, read_lines
from pivotune.errors import UsageError
from pivotune.evaluation.sources import Source, hub_name, missing, read_hub_records
from pivotune.evaluation.tasks.question_answering import text_member

Value = TypeVar("Value")
Columns = Mapping[str, Sequence[str]]
"""Our name of a field -> the names publishers give it, upper or lower case; all of them are needed."""

_Row = tuple[int, list[str]]


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file or of the Hub.

    Attributes:
        values: by the names in `Columns`; what else the record holds stands under its own name.
        number: 1-based line or row.
        place: file and line, or Hub name and row, for messages.
    """

    values: Mapping[str, Any]
    number: int
    place: str

    def text(self, name: str) -> str:
        """The field as it stands; a `UsageError` where it is no text or blank."""
        return text_member(self.values, name, self.place)

    def label(self, name: str, allowed: Mapping[str, Value]) -> Value:
        """What `allowed` gives for the field, which may be a number or a text in upper or lower case."""
        value = self.values[name]
        found = str(value).strip().casefold()
        for label, meaning in allowed.items():
            if label.casefold() == found:
                return meaning
        raise self.error(f"{name} is {value!r:.60}; allowed: {', '.join(allowed)}")

    def error(self, problem: str) -> UsageError:
        return UsageError(f"{self.place}: {problem}")


@dataclass(frozen=True, slots=True)
class Split:
    """One part of a set.

    Attributes:
        name: as in results.
        patterns: its files, as for `Source.find`.
        aliases: other words for it that `--split` takes.
        hub: its name on the Hub, where that is another.
        files: the patterns in words, for the message that none is there.
    """

    name: str
    patterns: Sequence[str]
    aliases: Sequence[str] = ()
    hub: str | None = None
    files: str | None = None

    @property
    def hub_name(self) -> str:
        return self.hub or self.name


def choose_split(
    task: str,
    source: Source,
    splits: Sequence[Split],
    homepage: str,
    keep: Callable[[Path], bool] = lambda path: True,
) -> tuple[Split, list[Path]]:
    """The split that was asked for, else the first that is in the folder, and its files (none where the Hub is read).

    Args:
        splits: in the order in which they are taken where none was asked for.
        keep: says no to a file that has the right name and is something else.

    Raises:
        UsageError: there is no such split, or none of its files is in the folder.
    """
    wanted = splits
    if source.split is not None:
        wanted = [split for split in splits if source.split in (split.name, *split.aliases)]
    if not wanted:
        raise UsageError(f"{task}: has no split {source.split!r}; allowed: {', '.join(split.name for split in splits)}")
    if source.data_dir is None:
        return wanted[0], []
    for split in wanted:
        for pattern in split.patterns:
            if files := [path for path in source.find(pattern) if keep(path)]:
                return split, files
    names = " or ".join(split.files or " or ".join(split.patterns) for split in wanted)
    raise missing(task, source, names, homepage)


@dataclass(frozen=True, slots=True)
class Opened:
    """A split that was found: its name, where it comes from (file names or a Hub name), and its records."""

    split: str
    origin: list[str]
    records: Iterator[Record]


def open_set(
    task: str,
    source: Source,
    splits: Sequence[Split],
    homepage: str,
    *,
    read: Callable[[Path], Iterator[Record]],
    hub: tuple[str, str | None],
    columns: Columns,
    keep: Callable[[Path], bool] = lambda path: True,
) -> Opened:
    """A set whose splits are one file each, or the Hub's (`hub`: dataset and configuration; `columns`: its fields)."""
    split, files = choose_split(task, source, splits, homepage, keep)
    if files:
        return Opened(split.name, origin_of(source, files), read(only_file(task, files)))
    return Opened(split.name, [hub_name(*hub)], read_hub(task, *hub, split.hub_name, columns))


def only_file(task: str, files: Sequence[Path]) -> Path:
    """The one file; two of a name (a copy, another version) would have to be told apart by guessing."""
    if len(files) > 1:
        raise UsageError(f"{task}: {files[0]} and {files[1]} are both there; keep one of them below --data-dir")
    return files[0]


def origin_of(source: Source, files: Iterable[Path]) -> list[str]:
    """File names relative to the data folder, the same on every machine."""
    return [path.relative_to(source.data_dir or path.parent).as_posix() for path in files]


def index_by_id(task: str, origin: Sequence[str], rows: Iterable[tuple[str, Record, Value]]) -> dict[str, Value]:
    """(id, record, value) as a mapping from id to value, in order.

    Raises:
        UsageError: an id comes twice, or there is nothing at all.
    """
    index: dict[str, Value] = {}
    for identifier, record, value in rows:
        if identifier in index:
            raise record.error(f"the id {identifier!r} stands here for the second time")
        index[identifier] = value
    if not index:
        raise UsageError(f"{task}: no questions in {', '.join(origin)}")
    return index


def read_table(
    path: Path,
    columns: Columns,
    *,
    delimiter: str = "\t",
    header: bool | None = None,
    unquote: bool = False,
) -> Iterator[Record]:
    """Records of a table.

    Tab-separated files are taken as they stand (a `"` is part of the text); comma-separated ones are CSV as spreadsheets
    write it.

    Args:
        header: whether the first row names the columns; None to see for oneself. Without one the cells are `columns` in
            their order.
        unquote: undo CSV quoting of single cells of a tab-separated file.
    """
    rows = _tab_rows(path, unquote) if delimiter == "\t" else _csv_rows(path)
    first = next(rows, None)
    if first is None:
        raise UsageError(f"{path}: no rows in it")
    line, cells = first
    has_header = header or (header is None and not _absent(cells, columns))
    names = [cell.strip() for cell in cells] if has_header else [spellings[0] for spellings in columns.values()]
    if has_header:
        _check_header(names, columns, f"{path}, line {line}")
    else:
        yield _table_record(path, columns, names, first)
    for row in rows:
        yield _table_record(path, columns, names, row)


def read_objects(path: Path, columns: Columns) -> Iterator[Record]:
    """Records of a JSON or JSON Lines file."""
    word = numbered_by(path)
    for number, value in read_file(path):
        place = f"{path}, {word} {number}"
        if not isinstance(value, dict):
            raise UsageError(f"{place}: {type(value).__name__} {value!r:.40}; allowed: an object")
        yield Record(_renamed(value, columns, place), number, place)


def read_hub(task: str, path: str, config: str | None, split: str, columns: Columns) -> Iterator[Record]:
    """Records of a Hub dataset's split."""
    for number, value in read_hub_records(task, path, config, split):
        place = f"{hub_name(path, config)}, row {number}"
        yield Record(_renamed(value, columns, place), number, place)


def _check_header(names: Sequence[str], columns: Columns, place: str) -> None:
    _our_names(names, columns, place)
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise UsageError(f"{place}: the header names the column {repeated!r} more than once")


def _our_names(found: Iterable[str], columns: Columns, place: str) -> dict[str, str]:
    """Name in the file -> our name, for the needed columns; a `UsageError` where one is not there."""
    in_file = {name.casefold(): name for name in found}
    if absent := _absent(in_file, columns):
        raise UsageError(f"{place}: no {absent[0]}; found: {', '.join(in_file.values())}")
    first = {name: next(word for word in words if word.casefold() in in_file) for name, words in columns.items()}
    return {in_file[word.casefold()]: name for name, word in first.items()}


def _absent(found: Iterable[str], columns: Columns) -> list[str]:
    """Needed columns that are not among the found, with all the names they may have."""
    there = {name.strip().casefold() for name in found}
    absent = [names for names in columns.values() if there.isdisjoint(name.casefold() for name in names)]
    return [" or ".join(map(repr, names)) for names in absent]


def _renamed(values: Mapping[str, Any], columns: Columns, place: str) -> dict[str, Any]:
    ours = _our_names(values, columns, place)
    return {ours.get(name, name): value for name, value in values.items()}


def _table_record(path: Path, columns: Columns, names: Sequence[str], row: _Row) -> Record:
    line, cells = row
    place = f"{path}, line {line}"
    if len(cells) != len(names):
        raise UsageError(f"{place}: {len(cells)} columns; expected {len(names)} ({', '.join(names)})")
    return Record(_renamed(dict(zip(names, cells, strict=True)), columns, place), line, place)


def _tab_rows(path: Path, unquote: bool) -> Iterator[_Row]:
    for number, line in enumerate(read_lines(path), start=1):
        text = line.rstrip("\r\n")
        if text:
            cells = text.split("\t")
            yield number, [_unquoted(cell) for cell in cells] if unquote else cells


def _unquoted(cell: str) -> str:
    """A quotation within the text is no quoting: what is inside may hold only doubled quotes."""
    inner = cell[1:-1]
    is_quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if is_quoted else cell


def _csv_rows(path: Path) -> Iterator[_Row]:
    """Rows with the line they begin in: a cell may hold line breaks."""
    # strict: a quote left open is an error with its line, not half the file in one cell.
    reader, begin = csv.reader(read_lines(path), strict=True), 1
    try:
        for cells in reader:
            if cells:
                yield begin, cells
            begin = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(f"{path}, line {begin}: broken CSV: {error}") from error
