"""Encoded rows outside memory: token ids and spans in two flat files, mapped when they are read.

The files lie in a temporary folder, which is removed when the store is no longer used or the process ends. A worker
process maps the same files.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from pivotune.data.examples import Pair, Side
from pivotune.data.lazy import LazySequence
from pivotune.data.spool import writing_temporary_data

# `length` is -1 where a row lacks the side.
_SIDE = np.dtype([(name, np.int32) for name in ("length", "query_start", "query_end", "answer", "characters")])
# `start`: place of the row's first token id; the target side comes first.
PAIR_RECORD = np.dtype([("number", np.int64), ("start", np.int64), ("target", _SIDE), ("english", _SIDE)])
_NO_SIDE = (-1, 0, 0, 0, 0)
_PAIRS_PER_WRITE = 1024
_ITEMS_PER_HASH = 2**20
_IDS, _PAIRS = "ids", "pairs"


class PairStore(LazySequence[Pair]):
    """Encoded rows, 4 bytes a token and 56 bytes a row on disk. Made by `store_pairs`.

    A pair that is asked for holds its ids as views of the mapped file.

    Attributes:
        table: `PAIR_RECORD` of every row: lengths and spans without making a `Pair`.
        ids: the token ids of all rows.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.table = _map(folder / _PAIRS, PAIR_RECORD)
        self.ids = _map(folder / _IDS, np.dtype(np.int32))

    def __len__(self) -> int:
        return len(self.table)

    def _item(self, index: int) -> Pair:
        number, start, target, english = self.table[index].item()
        middle = start + max(target[0], 0)
        return Pair(self._side(start, target), self._side(middle, english), number)

    def _side(self, start: int, record: tuple[int, int, int, int, int]) -> Side | None:
        length, query_start, query_end, answer, characters = record
        if length < 0:
            return None
        return Side(self.ids[start : start + length], (query_start, query_end), answer, characters)

    def __reduce__(self) -> tuple:
        """For a worker process: it maps the files, and leaves removing them to the process that wrote them."""
        return PairStore, (self._folder,)


def store_pairs(pairs: Iterable[Pair]) -> PairStore:
    """Write pairs to a temporary folder as they come.

    Raises:
        UsageError: they cannot be written.
    """
    with writing_temporary_data():
        folder = Path(tempfile.mkdtemp(prefix="pivotune-"))
    try:
        _write(folder, pairs)
        store = PairStore(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(store, _remove, folder, os.getpid())
    return store


def pair_table(pairs: Sequence[Pair]) -> np.ndarray:
    """`PAIR_RECORD` of every pair, whether they are stored or held in a list."""
    if isinstance(pairs, PairStore):
        return pairs.table
    records = np.empty(len(pairs), PAIR_RECORD)
    for index, pair in enumerate(pairs):
        records[index] = (pair.number, 0, _side_record(pair.target), _side_record(pair.english))
    return records


def pairs_digest(pairs: Sequence[Pair]) -> str:
    """SHA-256 over tokens, spans and places in the file of both sides, in order; the same for a store and a list."""
    spans, tokens = hashlib.sha256(), hashlib.sha256()
    for records, ids in _stored_parts(pairs) if isinstance(pairs, PairStore) else _flat_parts(pairs):
        records = records.copy()
        records["start"] = 0
        spans.update(records.tobytes())
        tokens.update(np.ascontiguousarray(ids).data)
    return hashlib.sha256(spans.digest() + tokens.digest()).hexdigest()


def _flat_parts(pairs: Iterable[Pair]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return (_flatten(chunk, 0) for chunk in _chunks(pairs))


def _stored_parts(store: PairStore) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The files as they are: no pair is made."""
    for array, is_table in ((store.table, True), (store.ids, False)):
        for start in range(0, len(array), _ITEMS_PER_HASH):
            part = array[start : start + _ITEMS_PER_HASH]
            yield (part, store.ids[:0]) if is_table else (store.table[:0], part)


def _write(folder: Path, pairs: Iterable[Pair]) -> None:
    start = 0
    with ExitStack() as stack:
        with writing_temporary_data():
            ids_file, pairs_file = (stack.enter_context((folder / name).open("wb")) for name in (_IDS, _PAIRS))
        for chunk in _chunks(pairs):
            records, ids = _flatten(chunk, start)
            start += len(ids)
            with writing_temporary_data():
                for file, array in ((ids_file, ids), (pairs_file, records)):
                    file.write(array.tobytes())
                    file.flush()


def _flatten(pairs: Sequence[Pair], start: int) -> tuple[np.ndarray, np.ndarray]:
    """`PAIR_RECORD` of pairs whose first id stands at `start`, and all their ids."""
    records = pair_table(pairs)
    sides = [side for pair in pairs for side in (pair.target, pair.english) if side is not None]
    lengths = sum(np.maximum(records[name]["length"], 0).astype(np.int64) for name in ("target", "english"))
    records["start"] = start + np.cumsum(lengths) - lengths
    return records, np.concatenate([np.empty(0, np.int32), *(side.ids.astype(np.int32) for side in sides)])


def _chunks(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """Outside `writing_temporary_data`: what the pairs' own iterator raises is no trouble of the disk."""
    chunk: list[Pair] = []
    for pair in pairs:
        chunk.append(pair)
        if len(chunk) == _PAIRS_PER_WRITE:
            yield chunk
            chunk = []
    yield chunk


def _side_record(side: Side | None) -> tuple[int, ...]:
    return _NO_SIDE if side is None else (len(side.ids), *side.query, side.answer, side.characters)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    """Copy on write: the ids must look writable to torch, and what is written to them reaches no file."""
    return np.asarray(np.memmap(path, dtype, mode="c")) if path.stat().st_size else np.empty(0, dtype)


def _remove(folder: Path, owner: int) -> None:
    """A forked worker that lets go of its copy must not take the files from the process that it was forked from."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
