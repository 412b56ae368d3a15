"""Data files of every type, written as users' own tools would write them."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest


@pytest.fixture(scope="session")
def write_file() -> Callable[[Path, list[dict]], Path]:
    """A function that writes records to a path, in the type that its name asks for, and gives the path back."""
    return _write_file


def _write_file(path: Path, records: list[dict]) -> Path:
    """Write records in the type that the name asks for; lists become JSON text in CSV and TSV."""
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
        data = path.read_bytes()
    elif kind in ("csv", "tsv"):
        data = _as_csv(path, records, "\t" if kind == "tsv" else ",")
    elif kind == "json":
        data = json.dumps(records, ensure_ascii=False, indent=1).encode()
    else:
        data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def _as_csv(path: Path, records: list[dict], delimiter: str) -> bytes:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]), delimiter=delimiter)
        writer.writeheader()
        for record in records:
            cells = {key: json.dumps(value) if isinstance(value, list) else value for key, value in record.items()}
            writer.writerow(cells)
    return path.read_bytes()
