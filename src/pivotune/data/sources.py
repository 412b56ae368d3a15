"""Rows from a file, two aligned files, a Hub dataset, or Python objects.

A source is one of
- a path to a data file (`formats.read_file`);
- a Hub dataset: `owner/name`, `owner/name:split`, `owner/name/config` or `owner/name/config:split`. A split may be a slice
  (`train[:1000]`); without one `train` is read, or the only split. A name that looks like a file here is a file, and
  `hub:` in front (`hub:owner/name`) always means the Hub;
- in Python, a `datasets.Dataset`, a list of dicts, any iterable of mappings, or a `Source` that was opened before.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pivotune.data.formats import numbered_by, read_file
from pivotune.data.hub import parse_hub_name, read_hub
from pivotune.data.lazy import LazySequence, Spool
from pivotune.data.rows import EMPTY, ENGLISH_KEYS, MISSING, USED_KEYS, Row, RowError, is_empty, parse_row, record_id
from pivotune.data.text_files import NumberedRecords
from pivotune.errors import UsageError
from pivotune.text.json_text import shown
from pivotune.text.words import counted

_OBJECTS = "a file, a Hub dataset name, a datasets.Dataset or a list of dicts"
# Skipped rows are counted by reason up to this many reasons, then together: a reason can quote a text of its row.
_REASONS = 50
_OTHER_REASONS = "other reasons"
_SKIP_HINT = "use data.on_bad_row: skip to leave them out"
_IDS_SHOWN = 3
_LANGUAGES = 10_000


@dataclass(frozen=True, eq=False)
class Rows(LazySequence[Row]):
    """The usable rows of a source, in its order, read once and kept on disk.

    Attributes:
        rows: the rows themselves.
        sources: the name of each source, in order, with the last row number before it.
        total: number of rows that were read, usable or not; `skipped` counts those left out by reason.
        skipped_at: the first place of each such reason, such as `pairs.jsonl, line 4`.
        unused: columns that are not read -> number of rows that have one.
        languages: the different values of `Row.language`.
        language_of: places in `languages`, uint16 (rows,).
    """

    rows: Sequence[Row]
    sources: Mapping[str, int]
    total: int
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_at: dict[str, str] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)
    languages: Sequence[str] = ()
    language_of: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint16))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def source(self) -> str:
        """The names of the sources."""
        return ", ".join(self.sources)

    @property
    def notes(self) -> list[str]:
        """A line that names the columns that are not used, if there are any."""
        names = ", ".join(f"{shown(name)} (in {counted(count)})" for name, count in self.unused.items())
        return [f"columns that are not used: {names}"] if names else []

    def _item(self, index: int) -> Row:
        return self.rows[index]


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Return the rows of several sources one after the other, numbered on from one source to the next.

    Raises:
        UsageError: two sources have the same name.
    """
    if len(parts) == 1:
        return parts[0]
    sources, last = {}, 0
    for part in parts:
        if part.source in sources:
            raise UsageError(f"{part.source}: is named twice")
        sources[part.source] = last
        last += part[-1].number
    skipped, unused = (
        dict(sum((Counter(getattr(part, name)) for part in parts), Counter())) for name in ("skipped", "unused")
    )
    places = {reason: place for part in reversed(parts) for reason, place in part.skipped_at.items()}
    return Rows(_Concatenation(parts, sources), sources, sum(part.total for part in parts), skipped, places, unused)


class _Concatenation(LazySequence[Row]):
    def __init__(self, parts: Sequence[Rows], sources: Mapping[str, int]) -> None:
        self._parts, self._starts = parts, list(sources.values())
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def _item(self, index: int) -> Row:
        place = bisect_right(self._ends, index)
        row = self._parts[place][index - self._ends[place]]  # from the end of the part
        return replace(row, number=self._starts[place] + row.number)


@dataclass(frozen=True, slots=True)
class Source:
    """Numbered records with the source's `name`, and the word for a number: 'line' or 'row'."""

    name: str
    unit: str
    records: NumberedRecords

    def place(self, number: int) -> str:
        return f"{self.name}, {self.unit} {number}"

    def bad_row(self, number: int, problem: RowError, label_end: str = "") -> _BadRow:
        return _BadRow(self.place(number), problem, f"{problem}{label_end}")


RowSource = str | os.PathLike[str] | Source | Iterable[Any]


class _BadRow(NamedTuple):
    """A record that cannot be used: its place, the problem, and the label under which such rows are counted."""

    place: str
    problem: RowError
    label: str


def load_rows(
    source: RowSource,
    *,
    english: RowSource | None = None,
    need_target: bool = True,
    need_english: bool = True,
    on_bad_row: Literal["error", "skip"] = "error",
    needed_by: str = "",
    limit: int | None = None,
) -> Rows:
    """Read the rows of a source, or of two aligned sources.

    Args:
        source: see the module's docstring.
        english: a second source with the English side under plain keys (`prompt`, `instruction`, `messages`...), joined by
            `id` where every row on both sides has its own, else in order.
        need_target: require the query and answer in the target language.
        need_english: require the query and answer in English.
        on_bad_row: 'error' refuses the source, naming the first bad row and the number of bad rows; 'skip' leaves bad rows
            out and counts them by reason.
        needed_by: the setting that needs the texts, for the message ('method deep-supervision').
        limit: keep at most this many rows; reading a single source stops there.

    Raises:
        UsageError: the source cannot be read, the two sources do not fit together, or rows are bad (see `on_bad_row`; a
            source without any usable row is always refused).
    """
    unused: Counter[str] = Counter()
    target = open_source(source, keep_bad=on_bad_row == "skip", unused=unused)
    outcomes: Iterator[Row | _BadRow]
    if english is None:
        parsed = ((number, _parse(record, number, need_target, need_english)) for number, record in target.records)
        outcomes = (row if isinstance(row, Row) else target.bad_row(number, row) for number, row in parsed)
    else:
        english_source = open_source(english, keep_bad=on_bad_row == "skip", unused=unused)
        outcomes = _join_rows(target, english_source, need_target, need_english, on_bad_row)
    rows: Spool[Row] = Spool()
    skipped: Counter[str] = Counter()
    skipped_at: dict[str, str] = {}
    languages: dict[str, int] = {}
    language_of = array("H")
    first_bad: _BadRow | None = None
    for outcome in outcomes:
        if isinstance(outcome, _BadRow):
            first_bad = first_bad or outcome
            label = outcome.label if outcome.label in skipped or len(skipped) < _REASONS else _OTHER_REASONS
            skipped[label] += 1
            skipped_at.setdefault(label, outcome.place)
            continue
        rows.append(outcome)
        # Of a column of other texts the first ones suffice.
        name = outcome.language if len(languages) < _LANGUAGES else next(reversed(languages))
        language_of.append(languages.setdefault(name, len(languages)))
        if len(rows) == limit:
            break
    total = len(rows) + skipped.total()
    if first_bad and (on_bad_row == "error" or not rows):
        raise UsageError(_bad_rows_message(first_bad, skipped, total, needed_by))
    names = (list(languages), np.array(language_of, dtype=np.uint16))
    return Rows(rows, {target.name: 0}, total, dict(skipped), skipped_at, dict(unused), *names)


def _bad_rows_message(first: _BadRow, counts: Counter[str], total: int, needed_by: str) -> str:
    bad, alike = counts.total(), counts[first.label]
    need = f", needed by {needed_by}" if needed_by and first.problem.reason in (MISSING, EMPTY) else ""
    if total == 1:
        share = "it is the only row"
    elif alike == total:
        share = f"all {total:,} rows are like this"
    else:
        share = f"{alike:,} of {total:,} rows {'is' if alike == 1 else 'are'} like this"
    others = f", {bad - alike} more cannot be used for other reasons" if bad > alike else ""
    hint = f" ({_SKIP_HINT})" if bad < total else ""
    return f"{first.place}: {first.problem}{first.problem.note}{need}; {share}{others}{hint}"


def _parse(record: Any, number: int, need_target: bool, need_english: bool) -> Row | RowError:
    if isinstance(record, RowError):
        return record
    try:
        return parse_row(record, number=number, need_target=need_target, need_english=need_english)
    except RowError as error:
        return error.with_traceback(None)


def check_source(source: str) -> None:
    """Read the first record of a file; a Hub name passes.

    Raises:
        UsageError: the file is missing, a folder, empty, of unknown type or unreadable.
    """
    if parse_hub_name(source) is None:
        next(open_source(source, keep_bad=True).records, None)


def open_source(source: RowSource, *, keep_bad: bool, unused: Counter[str] | None = None) -> Source:
    """Return the numbered records of a source; errors as `load_rows`."""
    name, unit = "the given rows", "row"
    if isinstance(source, Source):
        name, unit, records = source.name, source.unit, source.records
    elif isinstance(source, str) and (hub_name := parse_hub_name(source)):
        name, records = source, read_hub(hub_name)
    elif isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        name, unit, records = str(path), numbered_by(path), read_file(path, keep_bad=keep_bad)
    elif isinstance(source, Mapping):
        keys = ", ".join(str(key) for key in list(source)[:5])
        raise UsageError(f"data: found one mapping with the keys {keys}; give one of its splits, or rows ({_OBJECTS})")
    elif isinstance(source, Iterable):
        records = enumerate(source, start=1)
    else:
        raise UsageError(f"data: found {type(source).__name__}; allowed: {_OBJECTS}")
    return Source(name, unit, _checked(name, records, unused))


def _checked(name: str, records: NumberedRecords, unused: Counter[str] | None) -> NumberedRecords:
    """Refuse a source without records, and count the columns that are not read."""
    has_rows = False
    for number, record in records:
        has_rows = True
        if unused is not None and isinstance(record, Mapping):
            # As many names as reasons: a file may have its data in the names.
            filled = (str(key) for key in record.keys() - USED_KEYS if not is_empty(record[key]))
            unused.update(key for key in filled if key in unused or len(unused) < _REASONS)
        yield number, record
    if not has_rows:
        raise UsageError(f"{name}: holds no rows")


class _Entry(NamedTuple):
    """One record of two aligned sources. A record that cannot be read may still have an id in the file."""

    number: int
    id: str
    outcome: Row | RowError


class _Entries(Spool[_Entry]):
    """The records of one source on disk; memory grows by 24 bytes a record: its place and a digest of its id."""

    def __init__(self, source: Source, needed: bool, english: Source | None = None) -> None:
        super().__init__()
        self.source = source
        all_have_ids, digests = True, bytearray()
        for number, record in source.records:
            filled = (key for key in ENGLISH_KEYS if isinstance(record, Mapping) and not is_empty(record.get(key)))
            if english and (key := next(filled, None)):
                raise UsageError(
                    f"{source.place(number)}: has `{key}` already, but the English side is to come from {english.name}; "
                    "keep one of the two"
                )
            entry = _Entry(number, record_id(record), _parse(record, number, needed, False))
            self.append(entry)
            all_have_ids &= bool(entry.id) or isinstance(record, RowError)
            # A missing id equals no other: its first byte occurs in no UTF-8.
            id_bytes = entry.id.encode(errors="surrogatepass") or b"\xff" + f"{id(self)} {number}".encode()
            digests += hashlib.blake2b(id_bytes, digest_size=16).digest()
        self.digests = np.frombuffer(digests, dtype="S16")
        self.have_unique_ids = all_have_ids and len(np.unique(self.digests)) == len(self)


def _join_rows(
    target: Source, english: Source, need_target: bool, need_english: bool, on_bad_row: str
) -> Iterator[Row | _BadRow]:
    """Join two aligned sources, in the order of the target source.

    Both are read whole before the first row, because ids can join them only where every record has its own.

    Raises:
        UsageError: the sources do not fit together.
    """
    targets, englishes = _Entries(target, need_target, english), _Entries(english, need_english)
    if targets.have_unique_ids and englishes.have_unique_ids:
        yield from _join_by_id(targets, englishes, on_bad_row)
        return
    if len(targets) != len(englishes):
        raise UsageError(
            f"{target.name} has {len(targets)} rows, {english.name} has {len(englishes)}: without a"
            " unique `id` on every row of both they are joined row by row and must be equally long"
        )
    by_line = target.unit == english.unit == "line"
    for one, other in zip(targets, englishes, strict=True):
        # Blank lines at different places make as many rows, but not the same pairs.
        if by_line and one.number != other.number:
            raise UsageError(
                f"{target.place(one.number)}: comes together with {english.place(other.number)}: "
                "without a unique `id` on every row they are joined line by line, so blank lines must be the same in both"
            )
        yield _merge(one, other, target, english)


def _join_by_id(targets: _Entries, englishes: _Entries, on_bad_row: str) -> Iterator[Row | _BadRow]:
    # For each target its partner among the English rows, -1 without one.
    partners = np.full(len(targets), -1)
    _, joined, found = np.intersect1d(targets.digests, englishes.digests, assume_unique=True, return_indices=True)
    partners[joined] = found
    lone_targets, lone_englishes = np.flatnonzero(partners < 0), np.setdiff1d(np.arange(len(englishes)), found)
    if on_bad_row == "error" or len(lone_targets) == len(targets):
        for lone, entries, other in ((lone_targets, targets, englishes), (lone_englishes, englishes, targets)):
            if len(lone):
                ids = ", ".join(entries[place].id[:60] for place in lone[:_IDS_SHOWN])
                more = ", ..." if len(lone) > _IDS_SHOWN else ""
                hint = _SKIP_HINT if len(lone) < len(entries) else "without the column `id` they are joined row by row"
                name, missing = entries.source.name, f"{len(lone)} of {len(entries)} ids are not in {other.source.name}"
                raise UsageError(f"{name}: {missing}: {ids}{more} ({hint})")
    for target, partner in zip(targets, map(int, partners), strict=True):
        if partner < 0:
            yield _lone(target, targets.source, englishes.source)
        else:
            yield _merge(target, englishes[partner], targets.source, englishes.source)
    for place in lone_englishes:
        yield _lone(englishes[place], englishes.source, targets.source)


def _lone(entry: _Entry, source: Source, other: Source) -> _BadRow:
    # Joined by id, a record lacks its id only where it could not be read.
    unread = entry.outcome if isinstance(entry.outcome, RowError) and not entry.id else None
    return source.bad_row(entry.number, unread or RowError("id", f"is not in {other.name}"))


def _merge(target: _Entry, english: _Entry, source: Source, english_source: Source) -> Row | _BadRow:
    row, other = target.outcome, english.outcome
    if isinstance(row, RowError):
        return source.bad_row(target.number, row)
    if isinstance(other, RowError):
        return english_source.bad_row(english.number, other, f" in {english_source.name}")
    english_side = {"prompt_en": other.prompt, "completion_en": other.completion, "input_en": other.input}
    return replace(row, **english_side, history_en=other.history)
