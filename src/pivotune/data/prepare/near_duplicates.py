"""Near-duplicates by MinHash with banding (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, ch. 3).

Two texts are near-duplicates if the Jaccard similarity of their sets of shingles (runs of 5 characters, of 3 in scripts
without spaces) reaches the threshold. MinHash proposes pairs of rows, and the similarity of each proposed pair is computed
from the shingles themselves, so that no row is left out by chance. The numbers are fixed: equal rows give equal results.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pivotune.data.rows import Row
from pivotune.text.languages import Language

SHINGLE_CHARACTERS, SHINGLE_CHARACTERS_UNSPACED = 5, 3
UNSPACED_SCRIPTS = frozenset(("Hans", "Hant", "Jpan", "Khmr", "Laoo", "Mymr", "Thai", "Tibt"))
_PERMUTATIONS = 128
# Probability to find a pair that is as similar as the threshold; more similar pairs are found more surely.
_RECALL = 0.99
_ESTIMATE_MARGIN = 0.1
_SHINGLES_PER_STEP, _PAIRS_PER_STEP = 2048, 100_000
_MULTIPLIERS, _OFFSETS = np.random.default_rng(0).integers(2**64, size=(2, _PERMUTATIONS), dtype=np.uint64) | np.uint64(
    1
)
_PRIME, _MIX = np.uint64(0x100000001B3), np.uint64(0xFF51AFD7ED558CCD)


def shingle_length(language: Language) -> int:
    return SHINGLE_CHARACTERS_UNSPACED if language.script in UNSPACED_SCRIPTS else SHINGLE_CHARACTERS


def near_duplicates(
    rows: Sequence[Row], threshold: float, length: int, progress: Callable[[int], None] = lambda done: None
) -> np.ndarray:
    """Return pairs of places whose target sides are near-duplicates, int (pairs, 2), the earlier row first.

    Not every pair of a group of near-duplicates is among them, but pairs connect the whole group.

    Args:
        threshold: least Jaccard similarity, above 0.
        length: characters of a shingle (`shingle_length`).
        progress: called with the number of rows done so far.
    """
    size = _band_size(threshold)
    bands = np.empty((_PERMUTATIONS // size, len(rows)), dtype=np.uint64)
    signatures = np.empty((len(rows), _PERMUTATIONS), dtype=np.uint8)
    for place, row in enumerate(rows):
        minima = _minima(shingles(row_text(row), length))
        bands[:, place], signatures[place] = _band_hashes(minima, size), minima.astype(np.uint8)
        progress(place + 1)
    codes = np.unique(np.concatenate([_equal_neighbours(band) for band in bands]))
    found = []
    for part in np.array_split(codes, len(codes) // _PAIRS_PER_STEP + 1):
        pairs = np.stack([part // len(rows), part % len(rows)], axis=1)
        # The share of equal minima estimates the similarity, with a standard error of at most 0.045.
        likely = (signatures[pairs[:, 0]] == signatures[pairs[:, 1]]).mean(axis=1) >= threshold - _ESTIMATE_MARGIN
        for pair in pairs[likely]:
            one, other = (shingles(row_text(rows[int(row)]), length) for row in pair)
            found += [pair] if similarity(one, other) >= threshold else []
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def connected_groups(num_rows: int, pairs: Iterable[np.ndarray]) -> np.ndarray:
    """Return the number of each row's group, int (rows,): rows connected by pairs of places, (pairs, 2), are one group."""
    first, second = np.concatenate(list(pairs)).T
    links = coo_array((np.ones(len(first)), (first, second)), shape=(num_rows, num_rows))
    return connected_components(links, directed=False)[1]


def equal_pairs(keys: np.ndarray) -> np.ndarray:
    """Return pairs of places that connect the rows with equal keys, int (pairs, 2)."""
    order = np.argsort(keys, kind="stable")
    is_equal = keys[order[1:]] == keys[order[:-1]]
    return np.stack([order[:-1][is_equal], order[1:][is_equal]], axis=1)


def row_text(row: Row) -> str:
    """Return the target side as one text; a sentence that is prompt and answer at once counts once."""
    earlier = (turn["content"] for turn in row.history)
    return "\n".join(dict.fromkeys(text for text in (*earlier, row.prompt, row.input, row.completion) if text))


def shingles(text: str, length: int) -> np.ndarray:
    """Return the distinct 64-bit hashes of a text's shingles, sorted; case, width and white space do not count."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    codes = np.frombuffer(plain.encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    length = min(length, len(codes))
    hashes = np.zeros(len(codes) - length + 1, dtype=np.uint64)
    for place in range(length):
        hashes = hashes * _PRIME + codes[place : len(codes) - length + 1 + place]
    hashes = (hashes ^ (hashes >> np.uint64(33))) * _MIX
    return np.unique(hashes ^ (hashes >> np.uint64(33)))


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Return the Jaccard similarity of two sets: members of both over members of either."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def _band_size(threshold: float) -> int:
    """Return the most minima a band may have so that some band of two texts at the threshold is equal, by `_RECALL`."""
    sizes = range(1, _PERMUTATIONS + 1)
    return max(size for size in sizes if size == 1 or 1 - (1 - threshold**size) ** (_PERMUTATIONS // size) >= _RECALL)


def _minima(hashes: np.ndarray) -> np.ndarray:
    """Return the least value of the hashes under each permutation, uint64 (permutations,)."""
    minima = np.full(_PERMUTATIONS, np.iinfo(np.uint64).max)
    for start in range(0, len(hashes), _SHINGLES_PER_STEP):
        step = hashes[start : start + _SHINGLES_PER_STEP, None]
        np.minimum(minima, (step * _MULTIPLIERS + _OFFSETS).min(axis=0), out=minima)
    return minima


def _band_hashes(minima: np.ndarray, size: int) -> np.ndarray:
    """Return a hash of each band of `size` minima, uint64 (bands,)."""
    bands = minima[: len(minima) // size * size].reshape(-1, size)
    found = np.zeros(len(bands), dtype=np.uint64)
    for column in bands.T:
        found = (found ^ column) * _MIX
        found ^= found >> np.uint64(33)
    return found


def _equal_neighbours(band: np.ndarray) -> np.ndarray:
    """Return pairs of rows with an equal band, as `earlier * rows + later`: each with the last and first one before."""
    order = np.argsort(band, kind="stable")
    is_first = np.concatenate([[True], band[order[1:]] != band[order[:-1]]])
    firsts = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
    later = np.flatnonzero(~is_first)
    return np.concatenate([order[places] * len(order) + order[later] for places in (later - 1, firsts[later])])
