"""Overlap of rows with evaluation sets: runs of words that an item and a row share.

A text of an item overlaps a row if they share 13 words in a row (Brown et al. 2020, appendix C, GPT-3's rule), in scripts
without spaces 20 characters. A shorter text must occur in the row as a whole, and is compared from 8 words (GPT-3's
smallest N) or 12 characters on. Case, punctuation and digits do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np

from pivotune.data.check.language import Text
from pivotune.data.rows import Row
from pivotune.text.words import is_unspaced

WORDS, FEWEST_WORDS = 13, 8
CHARACTERS, FEWEST_CHARACTERS = 20, 12
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_TABLE_BITS = 24
_TABLE_SHIFT = np.uint64(64 - _TABLE_BITS)


@dataclass(slots=True)
class Overlap:
    """Overlap of the rows with one task.

    Attributes:
        items: number of items; `compared` of them have a text that is long enough.
        found: numbers (from 0) of the items with a text in some row.
        rows: places (from 0) of the rows with a text of some item.
    """

    items: int
    compared: int = 0
    found: set[int] = field(default_factory=set)
    rows: list[int] = field(default_factory=list)

    def to_dict(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the counts, and the numbers of the rows in their source."""
        numbers = [rows[place].number for place in self.rows]
        return {"items": self.items, "compared": self.compared, "overlapping": len(self.found), "rows": numbers}


def find_overlap(
    rows: Sequence[Row],
    tasks: Mapping[str, Sequence[Sequence[str]]],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Overlap]:
    """Return the overlap of the rows, in both languages, with each task.

    Args:
        tasks: texts of every item of each task.
    """
    found = {name: Overlap(len(items)) for name, items in tasks.items()}
    owners: list[tuple[str, int]] = []
    grams, owner_of, lengths = [], [], set()
    for name, items in tasks.items():
        for number, texts in enumerate(items):
            parts = [part for text in texts if len(part := _item_grams(text, lengths))]
            found[name].compared += bool(parts)
            grams += parts
            owner_of += [len(owners)] * sum(map(len, parts))
            owners.append((name, number))
    hashes = np.concatenate([np.zeros(0, dtype=np.uint64), *grams])
    order = np.argsort(hashes, kind="stable")
    hashes, owner_of = hashes[order], np.array(owner_of, dtype=np.int64)[order]
    # A table by the first bits rules out most runs far faster than the search.
    is_likely = np.zeros(2**_TABLE_BITS, dtype=bool)
    is_likely[hashes >> _TABLE_SHIFT] = True
    for place, row in enumerate(rows):
        texts = dict.fromkeys(text for side in row.sides for text in side.texts)
        # A line end stands between two texts and is no word.
        units = _hashes([unit for text in texts for unit in ("\n", *_units(text))])
        windows = np.concatenate([np.zeros(0, dtype=np.uint64), *_windows(units, lengths)])
        windows = windows[is_likely[windows >> _TABLE_SHIFT]]
        first, last = (np.searchsorted(hashes, windows, side=side) for side in ("left", "right"))
        hits = {
            owners[owner] for at in np.flatnonzero(first < last) for owner in owner_of[first[at] : last[at]].tolist()
        }
        for name, number in hits:
            found[name].found.add(number)
        for name in {name for name, _ in hits}:
            found[name].rows.append(place)
        progress(place + 1)
    return found


def _units(text: str) -> list[str]:
    """Return the words of a text; in a script without spaces every character is one."""
    return [unit for word in Text(text).words for unit in (word if is_unspaced(word) else (word,))]


def _item_grams(text: str, lengths: set[int]) -> np.ndarray:
    """Return the hashes of the runs of a text that are looked for, uint64; their length is added to `lengths`."""
    units = _units(text)
    unspaced = 2 * sum(map(is_unspaced, units)) > len(units)
    most, fewest = (CHARACTERS, FEWEST_CHARACTERS) if unspaced else (WORDS, FEWEST_WORDS)
    if len(units) < fewest:
        return np.zeros(0, dtype=np.uint64)
    length = min(most, len(units))
    lengths.add(length)
    return next(_windows(_hashes(units), {length}))


def _hashes(units: Sequence[str]) -> np.ndarray:
    return np.array([_unit_hash(unit) for unit in units], dtype=np.uint64)


@lru_cache(maxsize=2**18)
def _unit_hash(unit: str) -> int:
    return int.from_bytes(blake2b(unit.encode(errors="surrogatepass"), digest_size=8).digest())


def _windows(units: np.ndarray, lengths: set[int]) -> Iterator[np.ndarray]:
    """Yield the hashes of all runs of each length, uint64, the shortest first."""
    hashes = np.zeros(len(units), dtype=np.uint64)
    for length in range(1, max(lengths, default=0) + 1):
        if length > len(units):
            return
        hashes = hashes[: len(units) - length + 1] * _PRIME + units[length - 1 :]
        if length in lengths:
            yield hashes
