"""Encoded rows on disk: token ids, spans and languages in flat files, mapped into memory when they are read.

The files lie in a temporary folder, which is removed with the store; a worker process maps the same files. Random access
through `datasets` takes 13 times as long (pyarrow alone 1.8 times), and the table of lengths would be copied into memory.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pivotune.data.examples import Pair, Side
from pivotune.data.lazy import LazySequence, writing_temporary_data

# `length` is -1 where a row lacks the side.
_SIDE = np.dtype([(name, np.int32) for name in ("length", "query_start", "query_end", "answer", "characters")])
# `start`: place of the row's first token id; the target side comes first.
PAIR_RECORD = np.dtype([("number", np.int64), ("start", np.int64), ("target", _SIDE), ("english", _SIDE)])
_RECORD_BYTES = struct.Struct("=2q10i")  # one `PAIR_RECORD`
_NO_SIDE = (-1, 0, 0, 0, 0)


class PairStore(LazySequence[Pair]):
    """Encoded rows, 4 bytes a token and 58 bytes a row on disk. The ids of a pair are views of the mapped file.

    Attributes:
        sources: the sources of the rows, as in `Rows.sources`.
        languages: the different values of `Pair.language`.
        language_of: places in `languages`, uint16 (rows,).
        table: `PAIR_RECORD` of every row: lengths and spans without making a `Pair`.
        ids: the token ids of all rows.
    """

    def __init__(self, folder: Path, sources: Mapping[str, int], languages: Sequence[str] = ("",)) -> None:
        self._folder, self.sources, self.languages = folder, sources, languages
        self.language_of = _map(folder / "languages", np.dtype(np.uint16))
        self.table = _map(folder / "pairs", PAIR_RECORD)
        self.ids = _map(folder / "ids", np.dtype(np.int32))

    def __len__(self) -> int:
        return len(self.table)

    def _item(self, index: int) -> Pair:
        number, start, *records = self.table[index].item()
        language = self.languages[int(self.language_of[index])]
        sides = []
        for length, query_start, query_end, answer, characters in records:
            ids = self.ids[start : start + max(length, 0)]
            sides.append(None if length < 0 else Side(ids, (query_start, query_end), answer, characters))
            start += len(ids)
        return Pair(*sides, number=number, language=language)

    def __reduce__(self) -> tuple:
        """Pickle the folder's name: a worker process maps the files and leaves removing them to their owner."""
        return PairStore, (self._folder, self.sources, self.languages)


def store_pairs(pairs: Iterable[Pair], sources: Mapping[str, int] | None = None) -> PairStore:
    """Write pairs to a temporary folder one by one.

    Raises:
        UsageError: they cannot be written.
    """
    with writing_temporary_data():
        folder = Path(tempfile.mkdtemp(prefix="pivotune-"))
    try:
        start, languages = 0, dict[str, int]()
        with (
            writing_temporary_data(),
            (folder / "ids").open("wb") as ids,
            (folder / "pairs").open("wb") as records,
            (folder / "languages").open("wb") as language_of,
        ):
            for pair in pairs:
                records.write(_record_bytes(pair, start))
                language_of.write(np.uint16(languages.setdefault(pair.language, len(languages))).tobytes())
                start += sum(ids.write(part) for part in _id_bytes(pair)) // 4
        store = PairStore(folder, sources or {"data": 0}, list(languages))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(store, _remove, folder, os.getpid())
    return store


def pair_table(pairs: Sequence[Pair]) -> np.ndarray:
    """Return `PAIR_RECORD` of every pair, stored or in a list; `start` is 0 for a list."""
    if isinstance(pairs, PairStore):
        return pairs.table
    return np.frombuffer(b"".join(_record_bytes(pair, 0) for pair in pairs), PAIR_RECORD)


def pair_languages(pairs: Sequence[Pair]) -> np.ndarray:
    """Return `Pair.language` of every pair, texts (rows,), without making a `Pair` of a store."""
    if isinstance(pairs, PairStore):
        return np.array(pairs.languages, dtype=object)[pairs.language_of]
    return np.array([pair.language for pair in pairs], dtype=object)


def pairs_digest(pairs: Sequence[Pair]) -> str:
    """Return the SHA-256 over tokens, spans, numbers and languages, in order; the same for a store and a list."""
    spans, tokens = hashlib.sha256(), hashlib.sha256()
    for pair in pairs:
        spans.update(_record_bytes(pair, 0) + pair.language.encode())
        for part in _id_bytes(pair):
            tokens.update(part)
    return hashlib.sha256(spans.digest() + tokens.digest()).hexdigest()


def _record_bytes(pair: Pair, start: int) -> bytes:
    target, english = (
        _NO_SIDE if side is None else (len(side.ids), *side.query, side.answer, side.characters)
        for side in (pair.target, pair.english)
    )
    return _RECORD_BYTES.pack(pair.number, start, *target, *english)


def _id_bytes(pair: Pair) -> list[bytes]:
    return [side.ids.astype(np.int32).tobytes() for side in (pair.target, pair.english) if side is not None]


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    """Map a file, copy on write: the ids must look writable to torch, and changes to them reach no file."""
    return np.asarray(np.memmap(path, dtype, mode="c")) if path.stat().st_size else np.empty(0, dtype)


def _remove(folder: Path, owner: int) -> None:
    """Remove the files in the process that wrote them, not in a worker that was forked from it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
