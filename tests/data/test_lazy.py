from __future__ import annotations

import errno
import gc
import tempfile

import numpy as np
import pytest

from pivotune.data.lazy import Spool, Subset
from pivotune.data.rows import Row, RowError
from pivotune.errors import UsageError

ITEMS = [b"", b"a", "ናት?\n", b"\x00" * 5000, "\ud800", 7]


@pytest.mark.parametrize("in_memory", [0, 10, 2**20])
def test_items_come_back_in_any_order(monkeypatch, in_memory):
    monkeypatch.setattr("pivotune.data.lazy._BYTES_IN_MEMORY", in_memory)
    spool = Spool()
    for item in ITEMS:
        spool.append(item)
    assert len(spool) == len(ITEMS)
    assert list(spool) == ITEMS
    assert [spool[index] for index in (3, 0, 5, 2)] == [ITEMS[index] for index in (3, 0, 5, 2)]
    assert list(zip(spool, spool, strict=True)) == list(zip(ITEMS, ITEMS, strict=True))


def test_no_file_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("pivotune.data.lazy._BYTES_IN_MEMORY", 1)
    spool = Spool()
    spool.append(b"more than a byte")
    assert spool[0] == b"more than a byte"
    del spool
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(monkeypatch):
    spool = Spool()

    def full(item: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spool._file, "write", full)
    with pytest.raises(UsageError, match=r"temporary data cannot be written \(No space left on device\); make room"):
        spool.append(b"a")


def test_rows_come_back_whole():
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "ሰላም"})
    rows = [
        Row("x\u2028y", "z\n", "p", "a", "in", "in_en", turns, turns[:1], "id-1", 3),
        Row("", "", "q", "b", number=4),
    ]
    store = Spool()
    for row in rows:
        store.append(row)
    assert list(store) == rows
    assert store[-1] == rows[1]
    assert store[:] == rows
    store.append(RowError("id", "is missing", "note"))
    assert (str(store[2]), store[2].note) == ("`id` is missing", "note")


def test_a_subset_reads_by_index():
    chosen = Subset("abcdef", np.array([4, 0, 2]))
    assert list(chosen) == ["e", "a", "c"]
    assert chosen[1:] == ["a", "c"]
    assert (len(chosen), chosen[-1]) == (3, "c")
    for outside in (3, -4):
        with pytest.raises(IndexError):
            chosen[outside]
