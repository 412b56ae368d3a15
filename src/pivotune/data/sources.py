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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pivotune.data.formats import numbered_by, read_file
from pivotune.data.hub import parse_hub_name, read_hub
from pivotune.data.lazy import LazySequence
from pivotune.data.pairing import SKIP_HINT, Pairing
from pivotune.data.record_source import BadRow, RecordSource, open_records, read_rows
from pivotune.data.row_store import RowStore
from pivotune.data.rows import EMPTY, MISSING, Message, Row, RowError, parse_row
from pivotune.data.text_files import NumberedRecords
from pivotune.errors import UsageError

__all__ = ["Message", "Row", "RowError", "RowSource", "Rows", "iter_records", "load_rows", "parse_row"]

RowSource = str | os.PathLike[str] | Iterable[Any]

_ON_BAD_ROW = ("error", "skip")
# Rows left out are counted apart for this many reasons, then together: reasons can name what only one row has.
_REASONS = 50
_OTHER_REASONS = "other reasons"


@dataclass(frozen=True, eq=False)
class Rows(LazySequence[Row]):
    """The usable rows of a source, in its order, read once and kept outside memory.

    Attributes:
        rows: the rows themselves.
        source: the source's name, for messages and the run folder.
        total: how many rows were read, usable or not.
        skipped: how many were left out, by reason; empty unless `on_bad_row="skip"`.
    """

    rows: Sequence[Row]
    source: str
    total: int
    skipped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def _item(self, index: int) -> Row:
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
    keep_bad = on_bad_row == "skip"
    target = _open_source(source, keep_bad=keep_bad)
    if english is None:
        outcomes = read_rows(target, need_target=need_target, need_english=need_english)
    else:
        english_source = _open_source(english, keep_bad=keep_bad)
        outcomes = Pairing(target, english_source, need_target, need_english, on_bad_row).read()
    return _collect(target.name, outcomes, on_bad_row=on_bad_row, needed_by=needed_by, limit=limit)


def _open_source(source: RowSource, *, keep_bad: bool = False) -> RecordSource:
    if isinstance(source, str) and (hub_name := parse_hub_name(source)):
        return open_records(source, "row", read_hub(hub_name))
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        return open_records(str(path), numbered_by(path), read_file(path, keep_bad=keep_bad))
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise UsageError(_wrong_object(source))
    return open_records("the given rows", "row", enumerate(source, start=1))


def _wrong_object(source: Any) -> str:
    allowed = "a file, a Hub dataset name, a datasets.Dataset or a list of dicts"
    if isinstance(source, Mapping):
        keys = ", ".join(str(key) for key in list(source)[:5])
        return f"data: found one mapping with the keys {keys}; give one of its splits, or rows ({allowed})"
    return f"data: found {type(source).__name__}; allowed: {allowed}"


def _collect(
    name: str, outcomes: Iterable[Row | BadRow], *, on_bad_row: str, needed_by: str, limit: int | None
) -> Rows:
    rows = RowStore()
    skipped: Counter[str] = Counter()
    first_bad: BadRow | None = None
    for outcome in outcomes:
        if isinstance(outcome, BadRow):
            first_bad = first_bad or outcome
            known = outcome.label in skipped or len(skipped) < _REASONS
            skipped[outcome.label if known else _OTHER_REASONS] += 1
            continue
        rows.append(outcome)
        if len(rows) == limit:
            break
    total = len(rows) + skipped.total()
    if first_bad and (on_bad_row == "error" or not rows):
        raise UsageError(_bad_rows_message(first_bad, skipped, total, needed_by))
    return Rows(rows, name, total, dict(skipped))


def _bad_rows_message(first: BadRow, counts: Counter[str], total: int, needed_by: str) -> str:
    bad, alike = counts.total(), counts[first.label]
    is_lacking = first.problem.reason in (MISSING, EMPTY)
    need = f", needed by {needed_by}" if needed_by and is_lacking else ""
    others = f", {bad - alike} more cannot be used for other reasons" if bad > alike else ""
    hint = f" ({SKIP_HINT})" if bad < total else ""
    return f"{first.place}: {first.problem}{first.problem.note}{need}; {_share(alike, total)}{others}{hint}"


def _share(alike: int, total: int) -> str:
    if total == 1:
        return "it is the only row"
    if alike == total:
        return f"all {total} rows are like this"
    return f"{alike} of {total} rows {'is' if alike == 1 else 'are'} like this"
