"""Rows from where a user keeps them: a file, two aligned files, a Hub dataset, or Python objects.

A source is one of
- a path to a data file (`formats.read_file`);
- a Hub dataset, `owner/name`, `owner/name:split` or `owner/name/config:split` (`hub.py`);
- in Python, a `datasets.Dataset`, a list of dicts, or any iterable of mappings.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from pivotune.data.formats import (
    NumberedRecords,
    numbered_by,
    read_file,
)
from pivotune.data.hub import parse_hub_name, read_hub
from pivotune.data.rows import (
    EMPTY,
    ENGLISH_KEYS,
    MISSING,
    Message,
    Row,
    RowError,
    parse_row,
    record_id,
)
from pivotune.errors import UsageError

__all__ = ["Message", "Row", "RowError", "RowSource", "Rows", "iter_records", "load_rows", "parse_row"]

RowSource = str | os.PathLike[str] | Iterable[Any]

_ON_BAD_ROW = ("error", "skip")
_SKIP_HINT = "use data.on_bad_row: skip to leave them out"
_IDS_SHOWN = 3


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """The usable rows of a source, in its order.

    Attributes:
        rows: the rows themselves.
        source: the source's name, for messages and the run folder.
        total: how many rows were read, usable or not.
        skipped: how many were left out, by reason; empty unless `on_bad_row="skip"`.
    """

    rows: list[Row]
    source: str
    total: int
    skipped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


def iter_records(source: RowSource) -> NumberedRecords:
    """Yield (number, record) for every record of a source, whatever its form; the number is 1-based.

    Memory does not grow with the source, except for `.json` files, which are read whole.

    Raises:
        UsageError: the source does not exist, cannot be read or holds no rows.
    """
    return _open_source(source).records


def load_rows(
    source: RowSource,
    *,
    english: RowSource | None = None,
    need_target: bool = True,
    need_english: bool = True,
    on_bad_row: str = "error",
    needed_by: str = "",
    limit: int | None = None,
) -> Rows:
    """Read the rows of a source, or of two aligned sources.

    Args:
        source: see the module's docstring.
        english: a second source with the English side under plain keys (`prompt`, `instruction`,
            `messages`...), joined by `id` where every row on both sides has its own, else by order.
        need_target: whether a row must have the target-language query and answer.
        need_english: whether a row must have the English query and answer.
        on_bad_row: 'error' refuses the source, naming the first bad row and how many there are; 'skip' leaves
            bad rows out and counts them by reason.
        needed_by: who needs the texts, for the message ('method deep-supervision').
        limit: keep at most this many rows; reading a single source stops there.

    Raises:
        UsageError: the source cannot be read, the two sources do not fit together, or rows are bad (see
            `on_bad_row`; a source without any usable row is always refused).
    """
    if on_bad_row not in _ON_BAD_ROW:
        raise UsageError(f"data.on_bad_row: {on_bad_row!r} is not allowed; allowed: {', '.join(_ON_BAD_ROW)}")
    if limit is not None and limit < 1:
        raise UsageError(f"limit: must be at least 1, found {limit}")
    target = _open_source(source)
    if english is None:
        outcomes = _read_single(target, need_target=need_target, need_english=need_english)
    else:
        pairs = _Pairing(target, _open_source(english), need_target, need_english, on_bad_row)
        outcomes = pairs.read()
    return _collect(target.name, outcomes, on_bad_row=on_bad_row, needed_by=needed_by, limit=limit)


@dataclass(frozen=True, slots=True)
class _Source:
    name: str
    unit: str
    records: NumberedRecords

    def place(self, number: int) -> str:
        return f"{self.name}, {self.unit} {number}"


@dataclass(frozen=True, slots=True)
class _BadRow:
    place: str
    problem: RowError
    label: str


def _open_source(source: RowSource) -> _Source:
    if isinstance(source, str) and (hub_name := parse_hub_name(source)):
        return _source(source, "row", read_hub(hub_name))
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        return _source(str(path), numbered_by(path), read_file(path))
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise UsageError(_wrong_object(source))
    return _source("the given rows", "row", enumerate(source, start=1))


def _source(name: str, unit: str, records: NumberedRecords) -> _Source:
    return _Source(name, unit, _refuse_none(name, records))


def _refuse_none(name: str, records: NumberedRecords) -> NumberedRecords:
    first = next(records, None)
    if first is None:
        raise UsageError(f"{name}: holds no rows")
    yield first
    yield from records


def _wrong_object(source: Any) -> str:
    allowed = "a file, a Hub dataset name, a datasets.Dataset or a list of dicts"
    if isinstance(source, Mapping):
        keys = ", ".join(str(key) for key in list(source)[:5])
        return f"data: found one mapping with the keys {keys}; give one of its splits, or rows ({allowed})"
    return f"data: found {type(source).__name__}; allowed: {allowed}"


def _read_single(source: _Source, *, need_target: bool, need_english: bool) -> Iterator[Row | _BadRow]:
    for number, record in source.records:
        try:
            yield parse_row(record, number=number, need_target=need_target, need_english=need_english)
        except RowError as error:
            yield _BadRow(source.place(number), error, str(error))


@dataclass(frozen=True, slots=True)
class _Entry:
    """One record of one of two aligned sources: read, or the reason why not."""

    number: int
    id: str
    outcome: Row | RowError


@dataclass(frozen=True, slots=True)
class _Pairing:
    """Two aligned sources, read whole because only then it is known whether ids can join them."""

    target: _Source
    english: _Source
    need_target: bool
    need_english: bool
    on_bad_row: str

    def read(self) -> Iterator[Row | _BadRow]:
        targets = list(self._entries(self.target, self.need_target))
        englishes = list(self._entries(self.english, self.need_english))
        if _have_unique_ids(targets) and _have_unique_ids(englishes):
            return self._join_by_id(targets, englishes)
        if len(targets) != len(englishes):
            raise UsageError(
                f"{self.target.name} has {len(targets)} rows, {self.english.name} has {len(englishes)}: without a"
                " unique `id` on every row of both they are joined row by row and must be equally long"
            )
        return map(self._merge, targets, englishes)

    def _entries(self, source: _Source, needed: bool) -> Iterator[_Entry]:
        for number, record in source.records:
            if source is self.target:
                self._refuse_english_keys(number, record)
            try:
                outcome = parse_row(record, number=number, need_target=needed, need_english=False)
            except RowError as error:
                # Without its traceback, which would keep the whole record in memory.
                outcome = error.with_traceback(None)
            yield _Entry(number, record_id(record), outcome)

    def _refuse_english_keys(self, number: int, record: Any) -> None:
        keys = [key for key in ENGLISH_KEYS if isinstance(record, Mapping) and record.get(key)]
        if keys:
            raise UsageError(
                f"{self.target.place(number)}: has `{keys[0]}` already, but the English side is to come"
                f" from {self.english.name}; keep one of the two"
            )

    def _join_by_id(self, targets: list[_Entry], englishes: list[_Entry]) -> Iterator[Row | _BadRow]:
        english_by_id = {entry.id: entry for entry in englishes}
        target_ids = {entry.id for entry in targets}
        lone_targets = [entry for entry in targets if entry.id not in english_by_id]
        lone_englishes = [entry for entry in englishes if entry.id not in target_ids]
        if self.on_bad_row == "error" or len(lone_targets) == len(targets):
            self._refuse_lone(lone_targets, self.target, len(targets), self.english)
            self._refuse_lone(lone_englishes, self.english, len(englishes), self.target)
        for entry in targets:
            partner = english_by_id.get(entry.id)
            yield self._merge(entry, partner) if partner else _lone(entry, self.target, self.english)
        for entry in lone_englishes:
            yield _lone(entry, self.english, self.target)

    def _refuse_lone(self, lone: list[_Entry], source: _Source, total: int, other: _Source) -> None:
        if not lone:
            return
        ids = ", ".join(entry.id for entry in lone[:_IDS_SHOWN]) + (", ..." if len(lone) > _IDS_SHOWN else "")
        hint = _SKIP_HINT if len(lone) < total else "without the column `id` they are joined row by row"
        raise UsageError(f"{source.name}: {len(lone)} of {total} ids are not in {other.name}: {ids} ({hint})")

    def _merge(self, target: _Entry, english: _Entry) -> Row | _BadRow:
        row, english_row = target.outcome, english.outcome
        if isinstance(row, RowError):
            return _BadRow(self.target.place(target.number), row, str(row))
        if isinstance(english_row, RowError):
            label = f"{english_row} in {self.english.name}"
            return _BadRow(self.english.place(english.number), english_row, label)
        return replace(
            row,
            prompt_en=english_row.prompt,
            completion_en=english_row.completion,
            input_en=english_row.input,
            history_en=english_row.history,
        )


def _have_unique_ids(entries: list[_Entry]) -> bool:
    ids = {entry.id for entry in entries}
    return len(ids) == len(entries) and "" not in ids


def _lone(entry: _Entry, source: _Source, other: _Source) -> _BadRow:
    problem = RowError("id", f"is not in {other.name}")
    return _BadRow(source.place(entry.number), problem, str(problem))


def _collect(
    name: str, outcomes: Iterable[Row | _BadRow], *, on_bad_row: str, needed_by: str, limit: int | None
) -> Rows:
    rows: list[Row] = []
    skipped: Counter[str] = Counter()
    first_bad: _BadRow | None = None
    for outcome in outcomes:
        if isinstance(outcome, _BadRow):
            first_bad = first_bad or outcome
            skipped[outcome.label] += 1
            continue
        rows.append(outcome)
        if len(rows) == limit:
            break
    total = len(rows) + skipped.total()
    if first_bad and (on_bad_row == "error" or not rows):
        raise UsageError(_bad_rows_message(first_bad, skipped, total, needed_by))
    return Rows(rows, name, total, dict(skipped))


def _bad_rows_message(first: _BadRow, counts: Counter[str], total: int, needed_by: str) -> str:
    bad, alike = counts.total(), counts[first.label]
    is_lacking = first.problem.reason in (MISSING, EMPTY)
    need = f", needed by {needed_by}" if needed_by and is_lacking else ""
    others = f", {bad - alike} more cannot be used for other reasons" if bad > alike else ""
    hint = f" ({_SKIP_HINT})" if bad < total else ""
    return f"{first.place}: {first.problem}{first.problem.note}{need}; {_share(alike, total)}{others}{hint}"


def _share(alike: int, total: int) -> str:
    if total == 1:
        return "it is the only row"
    if alike == total:
        return f"all {total} rows are like this"
    return f"{alike} of {total} rows {'is' if alike == 1 else 'are'} like this"
