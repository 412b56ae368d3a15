"""Near-duplicates by MinHash with banding (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, ch. 3).

Two texts are near-duplicates if the Jaccard similarity of their sets of shingles (runs of 5 characters, of 3 in scripts
without spaces) reaches the threshold. datasketch proposes earlier rows, and the similarity to each of them is computed from
the shingles themselves, so that no row is left out by chance. Its permutations are fixed: equal rows give equal results.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import cast
from zlib import crc32

from datasketch import MinHash, MinHashLSH

from pivotune.data.rows import Row
from pivotune.text.languages import Language

SHINGLE_CHARACTERS, SHINGLE_CHARACTERS_UNSPACED = 5, 3
UNSPACED_SCRIPTS = frozenset(("Hans", "Hant", "Jpan", "Khmr", "Laoo", "Mymr", "Thai", "Tibt"))
_PERMUTATIONS = 128
# Probability to find a pair that is as similar as the threshold; more similar pairs are found more surely.
_RECALL = 0.99
_SHINGLES_PER_STEP = 4096


def shingle_length(language: Language) -> int:
    return SHINGLE_CHARACTERS_UNSPACED if language.script in UNSPACED_SCRIPTS else SHINGLE_CHARACTERS


def near_duplicates(
    rows: Sequence[Row],
    places: Sequence[int],
    threshold: float,
    length: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[int, int]:
    """Return the place of each row to leave out -> that of the first kept row before it with a target side like its own.

    Args:
        places: the rows to compare, in order.
        threshold: least Jaccard similarity, above 0.
        length: characters of a shingle (`shingle_length`).
    """
    size = _band_size(threshold)
    kept = MinHashLSH(num_perm=_PERMUTATIONS, params=(_PERMUTATIONS // size, size))
    found: dict[int, int] = {}
    for done, place in enumerate(places, start=1):
        own = shingles(row_text(rows[place]), length)
        minima, hashes = MinHash(_PERMUTATIONS, hashfunc=int), [crc32(shingle.encode()) for shingle in own]
        for start in range(0, len(hashes), _SHINGLES_PER_STEP):
            minima.update_batch(hashes[start : start + _SHINGLES_PER_STEP])
        for other in sorted(cast(list[int], kept.query(minima))):
            if similarity(own, shingles(row_text(rows[other]), length)) >= threshold:
                found[place] = other
                break
        else:
            kept.insert(place, minima, check_duplication=False)
        progress(done)
    return found


def row_text(row: Row) -> str:
    """Return the target side as one text; a sentence that is prompt and answer at once counts once."""
    earlier = (turn["content"] for turn in row.history)
    return "\n".join(dict.fromkeys(text for text in (*earlier, row.prompt, row.input, row.completion) if text))


def shingles(text: str, length: int) -> set[str]:
    """Return the distinct shingles of a text; case, width and white space do not count."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return {plain[place : place + length] for place in range(max(1, len(plain) - length + 1))}


def similarity(one: set[str], other: set[str]) -> float:
    """Return the Jaccard similarity of two sets: members of both over members of either."""
    return len(one & other) / len(one | other)


def _band_size(threshold: float) -> int:
    """Return the most minima a band may have so that some band of two texts at the threshold is equal, by `_RECALL`."""
    sizes = range(1, _PERMUTATIONS // 2 + 1)  # datasketch needs two bands
    return max(size for size in sizes if size == 1 or 1 - (1 - threshold**size) ** (_PERMUTATIONS // size) >= _RECALL)
