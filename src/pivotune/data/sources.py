"""Rows from a file, two aligned files, a Hub dataset, or Python objects.

A source is one of
- a path to a data file (`formats.read_file`);
- a Hub dataset: `owner/name`, `owner/name:split`, `owner/name/config` or `owner/name/config:split`. A split may be a slice
  (`train[:1000]`); without one `train` is read, or the only split. A name that looks like a file here is a file, and
  `hub:` in front (`hub:owner/name`) always means the Hub;
- in Python, a `datasets.Dataset`, a list of dicts, or any iterable of mappings.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pivotune.data.formats import describe_file_types, is_data_file_name, missing_file_error, numbered_by, read_file
from pivotune.data.lazy import LazySequence, Spool
from pivotune.data.pairing import SKIP_HINT, BadRow, RecordSource, join_rows, read_rows
from pivotune.data.rows import EMPTY, MISSING, Row
from pivotune.data.text_files import NumberedRecords
from pivotune.errors import UsageError

RowSource = str | os.PathLike[str] | Iterable[Any]

_ON_BAD_ROW = ("error", "skip")
_OBJECTS = "a file, a Hub dataset name, a datasets.Dataset or a list of dicts"
_HUB_PREFIX = "hub:"
_HUB_NAME = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(?:/(?P<config>[^/:]+))?(?::(?P<split>.+))?")
# Skipped rows are counted by reason up to this many reasons, then together: a reason can quote a text of its row.
_REASONS = 50
_OTHER_REASONS = "other reasons"


@dataclass(frozen=True, eq=False)
class Rows(LazySequence[Row]):
    """The usable rows of a source, in its order, read once and kept on disk.

    Attributes:
        rows: the rows themselves.
        source: the source's name, for messages and the run folder.
        total: number of rows that were read, usable or not.
        skipped: number of rows left out, by reason; empty unless `on_bad_row="skip"`.
    """

    rows: Sequence[Row]
    source: str
    total: int
    skipped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def _item(self, index: int) -> Row:
        return self.rows[index]


class HubName(NamedTuple):
    """A dataset on the Hub: `path` is owner/name; `config` and `split` are None for the default ones."""

    path: str
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        config = f"/{self.config}" if self.config else ""
        split = f":{self.split}" if self.split else ""
        return f"{self.path}{config}{split}"


def iter_records(source: RowSource) -> NumberedRecords:
    """Yield (number, record) for every record of a source in any form; the number is 1-based.

    Memory does not grow with the source.

    Raises:
        UsageError: the source does not exist, cannot be read or holds no rows.
    """
    return _open_source(source, keep_bad=False).records


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
    if on_bad_row not in _ON_BAD_ROW:
        raise UsageError(f"data.on_bad_row: {on_bad_row!r} is not allowed; allowed: {', '.join(_ON_BAD_ROW)}")
    if limit is not None and limit < 1:
        raise UsageError(f"limit: must be at least 1, found {limit}")
    keep_bad = on_bad_row == "skip"
    target = _open_source(source, keep_bad=keep_bad)
    needs = {"need_target": need_target, "need_english": need_english}
    if english is None:
        outcomes = read_rows(target, **needs)
    else:
        outcomes = join_rows(target, _open_source(english, keep_bad=keep_bad), **needs, on_bad_row=on_bad_row)
    rows: Spool[Row] = Spool()
    skipped: Counter[str] = Counter()
    first_bad: BadRow | None = None
    for outcome in outcomes:
        if isinstance(outcome, BadRow):
            first_bad = first_bad or outcome
            is_counted_alone = outcome.label in skipped or len(skipped) < _REASONS
            skipped[outcome.label if is_counted_alone else _OTHER_REASONS] += 1
            continue
        rows.append(outcome)
        if len(rows) == limit:
            break
    total = len(rows) + skipped.total()
    if first_bad and (on_bad_row == "error" or not rows):
        raise UsageError(_bad_rows_message(first_bad, skipped, total, needed_by))
    return Rows(rows, target.name, total, dict(skipped))


def _bad_rows_message(first: BadRow, counts: Counter[str], total: int, needed_by: str) -> str:
    bad, alike = counts.total(), counts[first.label]
    is_lacking = first.problem.reason in (MISSING, EMPTY)
    need = f", needed by {needed_by}" if needed_by and is_lacking else ""
    if total == 1:
        share = "it is the only row"
    elif alike == total:
        share = f"all {total} rows are like this"
    else:
        share = f"{alike} of {total} rows {'is' if alike == 1 else 'are'} like this"
    others = f", {bad - alike} more cannot be used for other reasons" if bad > alike else ""
    hint = f" ({SKIP_HINT})" if bad < total else ""
    return f"{first.place}: {first.problem}{first.problem.note}{need}; {share}{others}{hint}"


def _open_source(source: RowSource, *, keep_bad: bool) -> RecordSource:
    name, unit = "the given rows", "row"
    if isinstance(source, str) and (hub_name := parse_hub_name(source)):
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
    return RecordSource(name, unit, _refuse_empty(name, records))


def _refuse_empty(name: str, records: NumberedRecords) -> NumberedRecords:
    first = next(records, None)
    if first is None:
        raise UsageError(f"{name}: holds no rows")
    yield first
    yield from records


def parse_hub_name(source: str) -> HubName | None:
    """Return the parts of a Hub name, or None for the name of a file here.

    Raises:
        UsageError: it is neither a Hub name nor a data file.
    """
    path = Path(source).expanduser()
    is_marked = source.startswith(_HUB_PREFIX)
    if not is_marked and (path.exists() or is_data_file_name(path)):
        return None
    match = _HUB_NAME.fullmatch(source.removeprefix(_HUB_PREFIX))
    if match and (is_marked or not path.parent.is_dir()):
        return HubName(**match.groupdict())
    if is_marked:
        raise UsageError(f"{source}: not a Hub dataset; allowed: hub:owner/name[/config][:split]")
    allowed = f"allowed: {describe_file_types()}; or a Hub dataset as hub:owner/name[:split]"
    raise UsageError(f"{missing_file_error(path)} ({allowed})")


def read_hub(name: HubName) -> NumberedRecords:
    """Yield (number, record) for every record of a Hub dataset, through `datasets` and its cache.

    Raises:
        UsageError: the dataset, config or split does not exist or cannot be loaded, in one line.
    """
    from datasets import load_dataset

    try:
        dataset: Any = load_dataset(name.path, name.config, split=name.split)
    except Exception as error:  # the Hub, the network and the builder share no narrower type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{name}: no such file, and as a Hub dataset it cannot be loaded: {reason}") from error
    if isinstance(dataset, Mapping):
        if "train" not in dataset and len(dataset) != 1:
            raise UsageError(f"{name}: has no split `train`; add one with a colon: {', '.join(map(str, dataset))}")
        dataset = dataset["train"] if "train" in dataset else next(iter(dataset.values()))
    yield from enumerate(dataset, start=1)
