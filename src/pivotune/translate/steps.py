"""Rows that a long command makes step by step: appended to a file beside the result, and continued after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from pivotune.data.check import report_path
from pivotune.data.formats import read_file
from pivotune.data.rows import Row
from pivotune.data.sources import Rows
from pivotune.errors import UsageError
from pivotune.text.files import json_line, write_json

Record = Mapping[str, Any]


@dataclass(frozen=True)
class StepFile:
    """One record for each row, in order: `pairs.translated.jsonl` for `pairs.jsonl`, with its settings in
    `pairs.translated.json`.

    Attributes:
        out: file of the result.
        made: what was done with a row, in the file's name.
        settings: a continued file must have the same.
        beside: further files made from the records, which a new beginning removes too.
    """

    out: Path
    made: str
    settings: Mapping[str, Any]
    beside: Sequence[Path] = ()

    @property
    def path(self) -> Path:
        return self.out.with_suffix(f".{self.made}.jsonl")

    def count_done(self, rows: Rows, matches: Callable[[Record, Row], bool]) -> int:
        """Return the number of rows that have their record; a last line that was cut off by a kill is removed.

        Args:
            matches: whether a record was made from a row.

        Raises:
            UsageError: a file in the place of ours, or one made from other rows or with other settings.
        """
        described = self.path.with_suffix(".json")
        hint = "name another file, or replace it with --overwrite"
        if not described.is_file():
            if found := next((path for path in (self.out, self.path) if path.exists()), None):
                raise UsageError(f"--out: {found} exists and was not begun by this command; {hint}")
            return 0
        try:
            begun = dict(json.loads(described.read_text(encoding="utf-8")))
            content = self.path.read_bytes() if self.path.is_file() else b""
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{described}: cannot be read: {error}; {hint}") from error
        whole = content.rfind(b"\n") + 1
        for key, value in self.settings.items():
            if whole and begun.get(key) != value:
                raise UsageError(f"--out: {self.out} was begun with {key} {begun.get(key)!r}, found {value!r}; {hint}")
        if whole < len(content):
            os.truncate(self.path, whole)
        done = 0
        for (line, record), row in zip(read_file(self.path) if whole else (), rows, strict=False):
            if not (isinstance(record, Mapping) and matches(record, row)):
                raise UsageError(
                    f"--out: {self.path}, line {line} was not made from row {row.number} of the data; {hint}"
                )
            done += 1
        return done

    def begin(self, *, overwrite: bool) -> None:
        """Write the settings; the files of an earlier command are removed or kept."""
        for path in (self.out, report_path(self.out), self.path, *self.beside) if overwrite else ():
            path.unlink(missing_ok=True)
        write_json(self.path.with_suffix(".json"), self.settings)

    def append(
        self,
        rows: Rows,
        done: int,
        make: Callable[[list[Row]], Sequence[Record]],
        rows_per_step: int,
        progress: Callable[[int], None],
    ) -> None:
        """Append the records that `make` returns for the rows behind the first `done` ones."""
        remaining = islice(iter(rows), done, None)
        progress(done)
        with self.path.open("ab") as file:
            while step := list(islice(remaining, rows_per_step)):
                append_records(file, make(step))
                done += len(step)
                progress(done)


def append_records(file: BinaryIO, records: Iterable[Record]) -> None:
    """Append JSON Lines that neither a kill nor a power failure loses."""
    file.writelines(map(json_line, records))
    file.flush()
    os.fsync(file.fileno())
