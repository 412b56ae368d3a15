"""Find and read benchmark data: publishers' files in a folder, or data sets of the Hugging Face Hub."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from pivotune.data.formats import numbered_by, read_file, read_lines
from pivotune.errors import UsageError

Value = TypeVar("Value")
# Field -> its spellings in files, in upper or lower case; every field is required.
Columns = Mapping[str, Sequence[str]]
# Dataset and configuration on the Hub.
Hub = tuple[str, str | None]

_KINDS = {str: "text", list: "a list", dict: "an object"}


class MissingDataError(UsageError):
    """A benchmark's data is absent; other benchmarks may be there."""


@dataclass(frozen=True)
class Source:
    """Files found by name at any depth of `data_dir`, or the Hub without it; fields as in `EvaluationSettings`."""

    data_dir: Path | None = None
    split: str | None = None
    pairs: tuple[Path, Path | None] | None = None

    def find(self, pattern: str) -> list[Path]:
        """Return the files that match a `fnmatch` pattern of the last folders and the name, plain or gzipped."""
        depth = pattern.count("/") + 1
        tails = [(path, "/".join(path.parts[-depth:])) for path in self._files]
        return [path for path, tail in tails if fnmatchcase(tail, pattern) or fnmatchcase(tail, f"{pattern}.gz")]

    @cached_property
    def _files(self) -> list[Path]:
        return sorted(path for path in self.data_dir.rglob("*") if path.is_file()) if self.data_dir else []


@dataclass(frozen=True, slots=True)
class Split:
    """One part of a set.

    Attributes:
        patterns: of its files, as for `Source.find`.
        aliases: other values of `--split`.
        hub: its name on the Hub, if different.
        files: the patterns in words, for messages.
    """

    name: str
    patterns: Sequence[str]
    aliases: Sequence[str] = ()
    hub: str | None = None
    files: str | None = None

    @property
    def hub_name(self) -> str:
        return self.hub or self.name


def missing_data(task: str, source: Source, wanted: str, homepage: str) -> MissingDataError:
    """Return the error for a set that is not in the folder."""
    advice = f"get it from {homepage}, or leave out --data-dir to use the Hub"
    return MissingDataError(f"{task}: no {wanted} below {source.data_dir}; {advice}")


def choose_split(
    task: str,
    source: Source,
    splits: Sequence[Split],
    homepage: str,
    keep: Callable[[Path], bool] = lambda path: True,
) -> tuple[Split, list[Path]]:
    """Return the requested split, else the first one in the folder, and its files (none for the Hub).

    `keep` returns False for a file with the right name and other content.
    """
    wanted = [split for split in splits if source.split in (None, split.name, *split.aliases)]
    if not wanted:
        raise UsageError(f"{task}: has no split {source.split!r}; allowed: {', '.join(split.name for split in splits)}")
    if source.data_dir is None:
        return wanted[0], []
    for split in wanted:
        for pattern in split.patterns:
            if files := [path for path in source.find(pattern) if keep(path)]:
                return split, files
    names = " or ".join(split.files or " or ".join(split.patterns) for split in wanted)
    raise missing_data(task, source, names, homepage)


def check_published(task: str, source: Source, language: str, languages: Sequence[str]) -> None:
    """Raise UsageError for a language that the Hub does not have, before a download."""
    if source.data_dir is None and language not in languages:
        has = f"the Hub has this set in {', '.join(languages)}"
        raise UsageError(f"{task}: {has}; another language needs its file and --data-dir")


def only_file(task: str, files: Sequence[Path]) -> Path:
    """Return the only file; refuse two files of one name (a copy, another version)."""
    if len(files) > 1:
        raise UsageError(f"{task}: {files[0]} and {files[1]} are both there; keep one of them below --data-dir")
    return files[0]


def origin_of(source: Source, files: Iterable[Path]) -> list[str]:
    """Return file names relative to the data folder, equal on every machine."""
    return [path.relative_to(source.data_dir or path.parent).as_posix() for path in files]


def hub_name(path: str, config: str | None) -> str:
    return path if config is None else f"{path}/{config}"


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file or of the Hub: values by the names in `Columns`, 1-based number, and place for messages.

    Fields beyond `Columns` keep their own name.
    """

    values: Mapping[str, Any]
    number: int
    place: str

    def text(self, name: str) -> str:
        """Return the field unchanged; raise UsageError for a blank field or another type."""
        return text_member(self.values, name, self.place)

    def label(self, name: str, allowed: Mapping[str, Value]) -> Value:
        """Return the value in `allowed` for the field: a number, or text in any case."""
        found = str(self.values[name]).strip().casefold()
        for label, meaning in allowed.items():
            if label.casefold() == found:
                return meaning
        raise self.error(f"{name} is {self.values[name]!r:.60}; allowed: {', '.join(allowed)}")

    def error(self, problem: str) -> UsageError:
        return UsageError(f"{self.place}: {problem}")


class OpenedSet(NamedTuple):
    """A split's name, its origin (file names or a Hub name) and its records."""

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
    hub: Hub,
    columns: Columns = MappingProxyType({}),
    keep: Callable[[Path], bool] = lambda path: True,
) -> OpenedSet:
    """Open a set with one file per split, or the Hub's data set with the fields `columns`."""
    split, files = choose_split(task, source, splits, homepage, keep)
    if files:
        return OpenedSet(split.name, origin_of(source, files), read(only_file(task, files)))
    return OpenedSet(split.name, [hub_name(*hub)], read_hub(task, hub, split.hub_name, columns))


def by_id(task: str, origin: Sequence[str], rows: Iterable[tuple[str, str, Value]]) -> dict[str, Value]:
    """Map ids to values, in order, from (id, place, value); refuse repeated ids, on which paired tests join."""
    values: dict[str, Value] = {}
    places: dict[str, str] = {}
    for key, place, value in rows:
        if key in values:
            raise UsageError(f"{place}: the id {key!r} is that of {places[key]} too; ids must be distinct")
        values[key], places[key] = value, place
    if not values:
        raise UsageError(f"{task}: no questions in {', '.join(origin)}")
    return values


def read_table(
    path: Path, columns: Columns, *, delimiter: str = "\t", header: bool | None = None, unquote: bool = False
) -> Iterator[Record]:
    """Yield the records of a table: tab-separated, where `"` is text, or CSV as spreadsheets write it.

    Args:
        header: True for column names in the first row; None to detect them, or take the cells as `columns` in order.
        unquote: undo CSV quoting of single cells of a tab-separated file.
    """
    rows = _tab_rows(path, unquote) if delimiter == "\t" else _csv_rows(path)
    line, cells = first = next(rows, (0, []))
    if not cells:
        raise UsageError(f"{path}: no rows in it")
    names = [cell.strip() for cell in cells]
    found = {name.casefold() for name in names}
    if header is None:
        header = all(any(name.casefold() in found for name in spellings) for spellings in columns.values())
    if header:
        fields = _fields(names, columns, f"{path}, line {line}")
        if repeated := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"{path}, line {line}: the header names the column {repeated[0]!r} more than once")
    else:
        names, fields = [spellings[0] for spellings in columns.values()], list(columns)
        rows = chain([first], rows)
    for line, cells in rows:
        place = f"{path}, line {line}"
        if len(cells) != len(names):
            raise UsageError(f"{place}: {len(cells)} columns; expected {len(names)} ({', '.join(names)})")
        yield Record(dict(zip(fields, cells, strict=True)), line, place)


def read_objects(path: Path, columns: Columns = MappingProxyType({})) -> Iterator[Record]:
    """Yield the records of a JSON or JSON Lines file."""
    return _records(read_file(path), columns, f"{path}, {numbered_by(path)}")


def read_hub(task: str, hub: Hub, split: str, columns: Columns) -> Iterator[Record]:
    """Yield the records of a Hub dataset's split."""
    return _records(read_hub_records(task, *hub, split), columns, f"{hub_name(*hub)}, row")


def _records(numbered: Iterable[tuple[int, Any]], columns: Columns, unit: str) -> Iterator[Record]:
    for number, value in numbered:
        place = f"{unit} {number}"
        if not isinstance(value, Mapping):
            raise UsageError(f"{place}: {type(value).__name__} {value!r:.40}; allowed: an object")
        yield Record(dict(zip(_fields(value, columns, place), value.values(), strict=True)), number, place)


def read_hub_records(task: str, path: str, config: str | None, split: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (number, record) for every record of a Hub dataset's split."""
    from datasets import load_dataset

    try:
        try:
            dataset: Any = load_dataset(path, config, split=split)
        except RuntimeError as error:
            # Older sets are loading scripts, which `datasets` no longer runs; the Hub keeps a converted copy of them.
            if "script" not in str(error):
                raise
            dataset = load_dataset(path, config, split=split, revision="refs/convert/parquet")
    except Exception as error:  # the Hub, the network, the builder: they share no narrower type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MissingDataError(
            f"{task}: the Hub dataset {hub_name(path, config)} cannot be loaded ({reason[:200]}); "
            "--data-dir reads local files, HF_HUB_OFFLINE=1 the cache alone, without retries"
        ) from error
    yield from enumerate(dataset, start=1)


def _fields(found: Iterable[str], columns: Columns, place: str) -> list[str]:
    """Return the field of every name in a file: its key in `columns`, else the name itself."""
    names = list(found)
    in_file = {name.strip().casefold(): name for name in names}
    fields: dict[str, str] = {}
    for field, spellings in columns.items():
        name = next((in_file[word.casefold()] for word in spellings if word.casefold() in in_file), None)
        if name is None:
            raise UsageError(f"{place}: no {' or '.join(map(repr, spellings))}; found: {', '.join(names)}")
        fields[name] = field
    return [fields.get(name, name) for name in names]


def _tab_rows(path: Path, unquote: bool) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(read_lines(path), start=1):
        if text := line.rstrip("\r\n"):
            cells = text.split("\t")
            # A quotation inside the text holds single quotes and is left alone.
            quoted = [bool(unquote and re.fullmatch(r'"([^"]|"")*"', cell)) for cell in cells]
            yield number, [c[1:-1].replace('""', '"') if q else c for c, q in zip(cells, quoted, strict=True)]


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield rows with their first line: a cell may hold line breaks."""
    # strict: an open quote is an error with its line, not half the file in one cell.
    reader, begin = csv.reader(read_lines(path), strict=True), 1
    try:
        for cells in reader:
            if cells:
                yield begin, cells
            begin = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(f"{path}, line {begin}: broken CSV: {error}") from error


def member(record: Any, key: str, kind: type[str] | type[list] | type[dict], place: str) -> Any:
    """Return `record[key]`, an object's member of the given kind; raise UsageError for anything else."""
    if not isinstance(record, Mapping):
        raise UsageError(f"{place}: found {_describe(record)}, where an object with {key!r} is needed")
    if key not in record:
        keys = ", ".join(repr(name) for name in list(record)[:8]) or "nothing"
        raise UsageError(f"{place}: no {key!r}; found {keys}")
    if not isinstance(record[key], kind):
        raise UsageError(f"{place}: {key!r} is {_describe(record[key])}; {_KINDS[kind]} is needed")
    return record[key]


def text_member(record: Any, key: str, place: str, *, may_be_blank: bool = False) -> str:
    """Return `record[key]` as text that a tokenizer can read; errors as `member`, also for blank text."""
    text = member(record, key, str, place)
    if not may_be_blank and not text.strip():
        raise UsageError(f"{place}: {key!r} is empty; text is needed")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{place}: {key!r} holds half of a surrogate pair, which is no character") from None
    return text


def id_member(record: Any, key: str, place: str) -> str:
    """Return `record[key]`, text or a whole number, as text; errors as `member`."""
    value = record.get(key) if isinstance(record, Mapping) else None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_member(record, key, place)


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    kinds = ((bool, "a truth value"), ((int, float), "a number"), *_KINDS.items())
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)
