"""Rows that were read once and are kept outside memory."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pivotune.data.lazy import LazySequence
from pivotune.data.rows import Row
from pivotune.data.spool import Spool

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class RowStore(LazySequence[Row]):
    """Rows as JSON in a `Spool`: memory grows by 8 bytes a row, whatever its texts."""

    def __init__(self) -> None:
        self._spool = Spool()

    def __len__(self) -> int:
        return len(self._spool)

    def append(self, row: Row) -> None:
        """Add a row at the end, before any is read."""
        self._spool.append(row_to_json(row))

    def _item(self, index: int) -> Row:
        return row_from_json(json.loads(self._spool.read(index)))

    def __iter__(self) -> Iterator[Row]:
        return (row_from_json(json.loads(item)) for item in self._spool.read_all())


def row_to_json(row: Row) -> bytes:
    """All fields of a row, as a JSON list."""
    fields = (row.prompt, row.completion, row.prompt_en, row.completion_en, row.input, row.input_en,
              row.history, row.history_en, row.id, row.number)  # fmt: skip
    return _ENCODER.encode(fields).encode()


def row_from_json(fields: list) -> Row:
    """The row that `row_to_json` wrote."""
    prompt, completion, prompt_en, completion_en, text, text_en, history, history_en, row_id, number = fields
    return Row(
        prompt, completion, prompt_en, completion_en, text, text_en, tuple(history), tuple(history_en), row_id, number
    )
