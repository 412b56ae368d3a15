"""From records to rows: those of one source, or of two aligned sources joined by `id` or in order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pivotune.data.lazy import Spool
from pivotune.data.rows import ENGLISH_KEYS, Row, RowError, parse_row, record_id
from pivotune.data.text_files import BadRecord, NumberedRecords
from pivotune.errors import UsageError

SKIP_HINT = "use data.on_bad_row: skip to leave them out"
_IDS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class RecordSource:
    """Numbered records with the source's `name`, and the word for a number: 'line' or 'row'."""

    name: str
    unit: str
    records: NumberedRecords

    def place(self, number: int) -> str:
        """Return the name and number of a record for messages."""
        return f"{self.name}, {self.unit} {number}"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A record that cannot be used: its place, the problem, and the label under which such rows are counted."""

    place: str
    problem: RowError
    label: str


@dataclass(frozen=True, slots=True)
class _Entry:
    """One record of an aligned source. A record that is `unreadable` may still have an id in the file."""

    number: int
    id: str
    outcome: Row | RowError
    unreadable: bool


def read_rows(source: RecordSource, *, need_target: bool, need_english: bool) -> Iterator[Row | BadRow]:
    """Yield every record of a source as a row or as a `BadRow`."""
    for number, record in source.records:
        outcome = _parse(record, number, need_target=need_target, need_english=need_english)
        yield outcome if isinstance(outcome, Row) else BadRow(source.place(number), outcome, str(outcome))


def join_rows(
    target: RecordSource, english: RecordSource, *, need_target: bool, need_english: bool, on_bad_row: str
) -> Iterator[Row | BadRow]:
    """Join two aligned sources, in the order of the target source.

    Both are read whole before the first row, because ids can join them only where every record has its own.

    Raises:
        UsageError: the sources do not fit together.
    """
    targets = _Entries(target, _refuse_english_keys(target, english), need_target)
    englishes = _Entries(english, english.records, need_english)
    if targets.have_unique_ids() and englishes.have_unique_ids():
        return _join_by_id(targets, englishes, on_bad_row)
    if len(targets) != len(englishes):
        raise UsageError(
            f"{target.name} has {len(targets)} rows, {english.name} has {len(englishes)}: without a"
            " unique `id` on every row of both they are joined row by row and must be equally long"
        )
    return _join_in_order(targets, englishes)


class _Entries(Spool[_Entry]):
    """The records of one source on disk; memory grows by 24 bytes a record: its place and a digest of its id."""

    def __init__(self, source: RecordSource, records: NumberedRecords, needed: bool) -> None:
        super().__init__()
        self.source = source
        self._all_have_ids = True
        digests = bytearray()
        for number, record in records:
            outcome = _parse(record, number, need_target=needed, need_english=False)
            entry = _Entry(number, record_id(record), outcome, isinstance(record, BadRecord))
            self.append(entry)
            self._all_have_ids &= bool(entry.id) or entry.unreadable
            # A missing id equals no other: its first byte occurs in no UTF-8.
            id_bytes = entry.id.encode(errors="surrogatepass") or b"\xff" + f"{id(self)} {number}".encode()
            digests += hashlib.blake2b(id_bytes, digest_size=16).digest()
        self.digests = np.frombuffer(digests, dtype="S16")

    def have_unique_ids(self) -> bool:
        return self._all_have_ids and len(np.unique(self.digests)) == len(self)


def _refuse_english_keys(target: RecordSource, english: RecordSource) -> NumberedRecords:
    for number, record in target.records:
        key = next((key for key in ENGLISH_KEYS if isinstance(record, Mapping) and record.get(key)), None)
        if key:
            raise UsageError(
                f"{target.place(number)}: has `{key}` already, but the English side is to come from {english.name}; "
                "keep one of the two"
            )
        yield number, record


def _parse(record: Any, number: int, *, need_target: bool, need_english: bool) -> Row | RowError:
    if isinstance(record, BadRecord):
        return RowError("", record.reason, record.note)
    try:
        return parse_row(record, number=number, need_target=need_target, need_english=need_english)
    except RowError as error:
        return error.with_traceback(None)


def _join_in_order(targets: _Entries, englishes: _Entries) -> Iterator[Row | BadRow]:
    by_line = targets.source.unit == englishes.source.unit == "line"
    for target, english in zip(targets, englishes, strict=True):
        # Blank lines at different places make as many rows, but not the same pairs.
        if by_line and target.number != english.number:
            raise UsageError(
                f"{targets.source.place(target.number)}: comes together with {englishes.source.place(english.number)}: "
                "without a unique `id` on every row they are joined line by line, so blank lines must be the same in both"
            )
        yield _merge(target, english, targets.source, englishes.source)


def _join_by_id(targets: _Entries, englishes: _Entries, on_bad_row: str) -> Iterator[Row | BadRow]:
    # For each target its partner among the English rows, -1 without one.
    partners = np.full(len(targets), -1)
    _, joined, found = np.intersect1d(targets.digests, englishes.digests, assume_unique=True, return_indices=True)
    partners[joined] = found
    lone_targets, lone_englishes = np.flatnonzero(partners < 0), np.setdiff1d(np.arange(len(englishes)), found)
    if on_bad_row == "error" or len(lone_targets) == len(targets):
        _refuse_lone(lone_targets, targets, englishes.source)
        _refuse_lone(lone_englishes, englishes, targets.source)
    for target, partner in zip(targets, map(int, partners), strict=True):
        if partner < 0:
            yield _lone(target, targets.source, englishes.source)
        else:
            yield _merge(target, englishes[partner], targets.source, englishes.source)
    for place in lone_englishes:
        yield _lone(englishes[place], englishes.source, targets.source)


def _refuse_lone(lone: np.ndarray, entries: _Entries, other: RecordSource) -> None:
    if len(lone) == 0:
        return
    shown = ", ".join(entries[place].id[:60] for place in lone[:_IDS_SHOWN])
    ids = shown + (", ..." if len(lone) > _IDS_SHOWN else "")
    hint = SKIP_HINT if len(lone) < len(entries) else "without the column `id` they are joined row by row"
    raise UsageError(
        f"{entries.source.name}: {len(lone)} of {len(entries)} ids are not in {other.name}: {ids} ({hint})"
    )


def _lone(entry: _Entry, source: RecordSource, other: RecordSource) -> BadRow:
    # Joined by id, a record lacks its id only where it could not be read.
    unread = entry.outcome if isinstance(entry.outcome, RowError) and not entry.id else None
    problem = unread or RowError("id", f"is not in {other.name}")
    return BadRow(source.place(entry.number), problem, str(problem))


def _merge(target: _Entry, english: _Entry, source: RecordSource, english_source: RecordSource) -> Row | BadRow:
    row, english_row = target.outcome, english.outcome
    if isinstance(row, RowError):
        return BadRow(source.place(target.number), row, str(row))
    if isinstance(english_row, RowError):
        label = f"{english_row} in {english_source.name}"
        return BadRow(english_source.place(english.number), english_row, label)
    return replace(
        row,
        prompt_en=english_row.prompt,
        completion_en=english_row.completion,
        input_en=english_row.input,
        history_en=english_row.history,
    )
