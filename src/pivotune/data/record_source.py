"""An opened source of records, and why one of its records cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pivotune.data.rows import Row, RowError, parse_row
from pivotune.data.text_files import BadRecord, NumberedRecords
from pivotune.errors import UsageError


@dataclass(frozen=True, slots=True)
class RecordSource:
    """Numbered records with the source's `name`, and the word for a number: 'line' or 'row'."""

    name: str
    unit: str
    records: NumberedRecords

    def place(self, number: int) -> str:
        """Where a record stands, for messages."""
        return f"{self.name}, {self.unit} {number}"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A record that cannot be used: where it stands, why, and the label to count rows with this problem by."""

    place: str
    problem: RowError
    label: str


def open_records(name: str, unit: str, records: NumberedRecords) -> RecordSource:
    """A source that refuses to be empty."""
    return RecordSource(name, unit, _refuse_none(name, records))


def read_record(record: Any, number: int, *, need_target: bool, need_english: bool) -> Row:
    """`parse_row`, also for what stands in place of a record that cannot be read.

    Raises:
        RowError: the record cannot be used.
    """
    if isinstance(record, BadRecord):
        raise RowError("", record.reason, record.note)
    return parse_row(record, number=number, need_target=need_target, need_english=need_english)


def read_rows(source: RecordSource, *, need_target: bool, need_english: bool) -> Iterator[Row | BadRow]:
    """Every record of a source as a row, or why not."""
    for number, record in source.records:
        try:
            yield read_record(record, number, need_target=need_target, need_english=need_english)
        except RowError as error:
            yield BadRow(source.place(number), error.with_traceback(None), str(error))


def _refuse_none(name: str, records: NumberedRecords) -> NumberedRecords:
    first = next(records, None)
    if first is None:
        raise UsageError(f"{name}: holds no rows")
    yield first
    yield from records
