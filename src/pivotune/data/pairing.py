"""Rows of two aligned sources: target side and English side, joined by `id` or in order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np

from pivotune.data.lazy import LazySequence
from pivotune.data.record_source import BadRow, RecordSource, read_record
from pivotune.data.row_store import row_from_json, row_to_json
from pivotune.data.rows import ENGLISH_KEYS, Row, RowError, record_id
from pivotune.data.spool import Spool
from pivotune.data.text_files import BadRecord
from pivotune.errors import UsageError

SKIP_HINT = "use data.on_bad_row: skip to leave them out"
_IDS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class _Entry:
    """One record of one of two aligned sources: read, or the reason why not. What is `unreadable` may have an id."""

    number: int
    id: str
    outcome: Row | RowError
    unreadable: bool = False


class _Entries(LazySequence[_Entry]):
    """The records of one source outside memory, which grows by 24 bytes a record: a place and a digest of the id."""

    def __init__(self, name: str, entries: Iterator[_Entry]) -> None:
        self._spool = Spool()
        digests = bytearray()
        self.all_have_ids = True
        for entry in entries:
            self._spool.append(_entry_to_json(entry))
            # No id is like another record's; the first byte occurs in no UTF-8.
            id_bytes = entry.id.encode(errors="surrogatepass") or b"\xff" + f"{name} {entry.number}".encode()
            digests += hashlib.blake2b(id_bytes, digest_size=16).digest()
            self.all_have_ids &= bool(entry.id) or entry.unreadable
        # (records, 2): equal rows are equal ids.
        self.digests = np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spool)

    def _item(self, index: int) -> _Entry:
        return _entry_from_json(json.loads(self._spool.read(index)))

    def __iter__(self) -> Iterator[_Entry]:
        return (_entry_from_json(json.loads(item)) for item in self._spool.read_all())

    def have_unique_ids(self) -> bool:
        """Whether every record has an id of its own."""
        return self.all_have_ids and not _equal_neighbours(self.digests[_order(self.digests)]).any()


@dataclass(frozen=True, slots=True)
class Pairing:
    """Two aligned sources, read whole because only then it is known whether ids can join them."""

    target: RecordSource
    english: RecordSource
    need_target: bool
    need_english: bool
    on_bad_row: str

    def read(self) -> Iterator[Row | BadRow]:
        """The joined rows, in the order of the target source.

        Raises:
            UsageError: the sources do not fit together.
        """
        targets = _Entries("target", self._entries(self.target, self.need_target))
        englishes = _Entries("english", self._entries(self.english, self.need_english))
        if targets.have_unique_ids() and englishes.have_unique_ids():
            return self._join_by_id(targets, englishes)
        if len(targets) != len(englishes):
            raise UsageError(
                f"{self.target.name} has {len(targets)} rows, {self.english.name} has {len(englishes)}: without a"
                " unique `id` on every row of both they are joined row by row and must be equally long"
            )
        return self._join_in_order(targets, englishes)

    def _join_in_order(self, targets: _Entries, englishes: _Entries) -> Iterator[Row | BadRow]:
        by_line = self.target.unit == self.english.unit == "line"
        for target, english in zip(targets, englishes, strict=True):
            # Blank lines at different places make as many rows, but not the same pairs.
            if by_line and target.number != english.number:
                raise UsageError(
                    f"{self.target.place(target.number)}: comes together with {self.english.place(english.number)}: without"
                    " a unique `id` on every row they are joined line by line, so blank lines must be the same in both"
                )
            yield self._merge(target, english)

    def _entries(self, source: RecordSource, needed: bool) -> Iterator[_Entry]:
        for number, record in source.records:
            if source is self.target:
                self._refuse_english_keys(number, record)
            try:
                outcome = read_record(record, number, need_target=needed, need_english=False)
            except RowError as error:
                outcome = error
            yield _Entry(number, record_id(record), outcome, isinstance(record, BadRecord))

    def _refuse_english_keys(self, number: int, record: Any) -> None:
        keys = [key for key in ENGLISH_KEYS if isinstance(record, Mapping) and record.get(key)]
        if keys:
            raise UsageError(
                f"{self.target.place(number)}: has `{keys[0]}` already, but the English side is to come"
                f" from {self.english.name}; keep one of the two"
            )

    def _join_by_id(self, targets: _Entries, englishes: _Entries) -> Iterator[Row | BadRow]:
        partners = _partners(targets.digests, englishes.digests)
        lone_targets = np.flatnonzero(partners < 0)
        lone_englishes = np.setdiff1d(np.arange(len(englishes)), partners, assume_unique=True)
        if self.on_bad_row == "error" or len(lone_targets) == len(targets):
            self._refuse_lone(lone_targets, targets, self.target, self.english)
            self._refuse_lone(lone_englishes, englishes, self.english, self.target)
        for entry, partner in zip(targets, map(int, partners), strict=True):
            yield self._merge(entry, englishes[partner]) if partner >= 0 else _lone(entry, self.target, self.english)
        yield from map(_lone, map(englishes.__getitem__, lone_englishes), repeat(self.english), repeat(self.target))

    @staticmethod
    def _refuse_lone(lone: np.ndarray, entries: _Entries, source: RecordSource, other: RecordSource) -> None:
        if len(lone) == 0:
            return
        shown = ", ".join(entries[index].id[:60] for index in lone[:_IDS_SHOWN])
        ids = shown + (", ..." if len(lone) > _IDS_SHOWN else "")
        hint = SKIP_HINT if len(lone) < len(entries) else "without the column `id` they are joined row by row"
        raise UsageError(f"{source.name}: {len(lone)} of {len(entries)} ids are not in {other.name}: {ids} ({hint})")

    def _merge(self, target: _Entry, english: _Entry) -> Row | BadRow:
        row, english_row = target.outcome, english.outcome
        if isinstance(row, RowError):
            return BadRow(self.target.place(target.number), row, str(row))
        if isinstance(english_row, RowError):
            label = f"{english_row} in {self.english.name}"
            return BadRow(self.english.place(english.number), english_row, label)
        return replace(
            row,
            prompt_en=english_row.prompt,
            completion_en=english_row.completion,
            input_en=english_row.input,
            history_en=english_row.history,
        )


def _lone(entry: _Entry, source: RecordSource, other: RecordSource) -> BadRow:
    # Joined by id, only a record that could not be read is without one.
    unread = entry.outcome if isinstance(entry.outcome, RowError) and not entry.id else None
    problem = unread or RowError("id", f"is not in {other.name}")
    return BadRow(source.place(entry.number), problem, str(problem))


def _order(digests: np.ndarray) -> np.ndarray:
    """Places that sort the digests; equal ones stay in their order."""
    return np.lexsort((digests[:, 1], digests[:, 0]))


def _equal_neighbours(digests: np.ndarray) -> np.ndarray:
    return (digests[1:] == digests[:-1]).all(axis=1)


def _partners(target: np.ndarray, english: np.ndarray) -> np.ndarray:
    """For each target id its place among the English ids, -1 where it is not there; ids are unique on each side."""
    both = np.concatenate([target, english])
    order = _order(both)
    # A target comes before an English of the same id, since sorting keeps the order.
    same = _equal_neighbours(both[order])
    partners = np.full(len(target), -1, dtype=np.int64)
    partners[order[:-1][same]] = order[1:][same] - len(target)
    return partners


def _entry_to_json(entry: _Entry) -> bytes:
    outcome = entry.outcome
    if isinstance(outcome, Row):
        return row_to_json(outcome)
    problem = (outcome.key, outcome.reason, outcome.note, entry.id, entry.number)
    # ASCII: an id, or a name in a note, may hold half of a surrogate pair.
    return json.dumps({"bad": problem}).encode()


def _entry_from_json(value: Any) -> _Entry:
    if isinstance(value, list):
        row = row_from_json(value)
        return _Entry(row.number, row.id, row)
    key, reason, note, row_id, number = value["bad"]
    return _Entry(number, row_id, RowError(key, reason, note))
