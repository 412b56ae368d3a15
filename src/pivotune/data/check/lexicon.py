"""A small word lexicon learned from the pairs themselves, and the rows that it finds to be strangers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pivotune.data.check.row_checks import TextCheck

# Files with fewer rows teach no lexicon; only the row's own signals are used for them.
LEXICON_ROWS = 200
# Enough to learn the frequent words; more costs time and finds no more.
LEXICON_SAMPLE, LEXICON_WORDS = 8_000, 2_000
# Words in more rows than this, such as articles, are in every pair and tell pairs apart badly.
LEXICON_COMMON = 0.2
# A row needs this many known words on both sides to be judged.
LEXICON_TERMS = 4
# A row is flagged if it agrees with its English no better than this share of rows agrees with a stranger's. The most
# generous share is taken of whose flagged rows at least `LEXICON_PRECISION` must be strangers, as far as can be estimated.
LEXICON_SHARES, LEXICON_PRECISION = (0.97, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3), 0.9
# Good rows hardly ever agree less than this share of strangers, so those below it tell how many strangers there are.
LEXICON_SURE = 0.3
# The strangers' agreement is estimated on this many rows.
LEXICON_PROBES = 1_000


def stranger_pairs(texts: TextCheck, left_out: np.ndarray) -> dict[int, Strange] | None:
    """Rows whose texts agree with their English no better than with a stranger's; None where that cannot be told.

    Args:
        left_out: bool (rows,), rows to pass over.
    """
    learned = np.flatnonzero(~left_out[:: texts.terms_step]).tolist()
    if len(learned) < LEXICON_ROWS:
        return None
    lexicon = _Lexicon(texts, learned)
    whole = lexicon.strangers("pair")
    if whole is None:
        return None
    parts = {name: lexicon.strangers(name) or {} for name in ("answer", "prompt")}
    found = {place: Strange(name, excess) for name, part in parts.items() for place, excess in part.items()}
    found |= {place: Strange("pair", excess) for place, excess in whole.items()}
    return {place * texts.terms_step: strange for place, strange in found.items()}


class Strange(NamedTuple):
    """What of a row agrees no better than strangers do (`pair`, `prompt` or `answer`), and how far below the limit."""

    part: str
    excess: float


class _Lexicon:
    """Which words go with which English words, counted in the pairs themselves.

    Association of two words is the Dice coefficient of the rows they are in, the row in question left out. Agreement of two
    texts is the mean over all known words of the best association with a word of the other text. What counts is the
    gain: the difference to the agreement with English texts of other rows that are about as long.
    """

    def __init__(self, texts: TextCheck, learned: Sequence[int]) -> None:
        self._random = random.Random(0)
        self._learned = learned
        sample = learned[:: math.ceil(len(learned) / LEXICON_SAMPLE)]
        self._sample = frozenset(sample)
        self._target = _known_terms(texts.terms, sample, texts.num_terms)
        self._english = _known_terms(texts.terms_en, sample, texts.num_terms)
        self._together = _rows_with_both(self._target["pair"], self._english["pair"], sample)
        self._counts = _rows_with(self._target["pair"], sample)
        self._counts_en = _rows_with(self._english["pair"], sample)

    def strangers(self, part: str) -> dict[int, float] | None:
        """Rows that agree no better than strangers -> by how much; None if the lexicon cannot tell them apart."""
        target, english = self._target[part], self._english[part]
        judged = [row for row in self._learned if min(len(target[row]), len(english[row])) >= LEXICON_TERMS]
        if len(judged) < LEXICON_ROWS // 2:
            return None
        comparison = _Comparison(judged, target, english, self._agreement, self._random)
        probe = judged[:: math.ceil(len(judged) / LEXICON_PROBES)]
        strange = np.array([comparison.gain(row, comparison.stranger(row)) for row in probe])
        own = np.array([comparison.gain(row, row) for row in probe])
        if np.median(own) <= np.quantile(strange, 0.99):
            return None
        gains = comparison.gains_below(float(np.quantile(strange, max(LEXICON_SHARES))))
        limit = _precise_limit(np.array(list(gains.values())), strange)
        return {row: limit - gain for row, gain in gains.items() if gain < limit}

    def _agreement(self, target: np.ndarray, english: np.ndarray, own_row: int) -> float:
        own = int(own_row in self._sample)
        together = self._together[english[:, None], target] - own
        either = self._counts_en[english][:, None] + self._counts[target] - 2 * own
        dice = together / np.maximum(either, 1)
        return float(dice.max(axis=0).sum() / len(target) + dice.max(axis=1).sum() / len(english))


class _Comparison:
    """Agreement of rows with their own English text and with other rows' (`strangers`)."""

    def __init__(
        self,
        judged: Sequence[int],
        target: Sequence[np.ndarray],
        english: Sequence[np.ndarray],
        agreement: Callable[[np.ndarray, np.ndarray, int], float],
        generator: random.Random,
    ) -> None:
        self._target, self._english = target, english
        self._agreement, self._random = agreement, generator
        self._by_length = sorted(judged, key=lambda row: len(english[row]))
        self._place = {row: place for place, row in enumerate(self._by_length)}

    def stranger(self, row: int) -> int:
        """Another row whose English has about as many words."""
        distance = self._random.choice((-1, 1)) * self._random.randint(1, 50)
        return self._by_length[(self._place[row] + distance) % len(self._by_length)]

    def gain(self, row: int, other: int) -> float:
        """Agreement of a row with the English of `other`, minus that with strangers' English."""
        return self._between(row, other) - self._with_strangers(row)

    def gains_below(self, limit: float) -> dict[int, float]:
        """Gains of all rows that are below the limit."""
        # Most rows agree so well that no stranger could come near, and need no comparison.
        agreements = {row: self._between(row, row) for row in self._by_length}
        enough = limit + self._most_with_strangers()
        doubtful = [row for row, agreement in agreements.items() if agreement < enough]
        gains = {row: agreements[row] - self._with_strangers(row) for row in doubtful}
        return {row: gain for row, gain in gains.items() if gain < limit}

    def _most_with_strangers(self) -> float:
        probe = self._by_length[:: math.ceil(len(self._by_length) / LEXICON_PROBES)]
        return max(self._with_strangers(row) for row in probe)

    def _with_strangers(self, row: int) -> float:
        return sum(self._between(row, self.stranger(row)) for _ in range(3)) / 3

    def _between(self, row: int, other: int) -> float:
        return self._agreement(self._target[row], self._english[other], row if row == other else -1)


def _precise_limit(gains: np.ndarray, strange: np.ndarray) -> float:
    """The highest limit below which most rows are strangers.

    Of all strangers a share q gains less than the q-quantile of `strange`. So the number of strangers follows from the
    rows below a quantile that good rows do not reach, and from it how many of the rows below any other quantile they are.
    """
    strangers = (gains < np.quantile(strange, LEXICON_SURE)).sum() / LEXICON_SURE
    for share in LEXICON_SHARES:
        limit = float(np.quantile(strange, share))
        if share * strangers >= LEXICON_PRECISION * (gains < limit).sum():
            return limit
    return -math.inf


def _known_terms(
    terms: Sequence[tuple[np.ndarray, np.ndarray]], sample: Sequence[int], num_terms: int
) -> dict[str, list[np.ndarray]]:
    """Terms of prompts, answers and both as places in the vocabulary: the most frequent ones that are not everywhere."""
    pairs = [np.union1d(prompt, answer) for prompt, answer in terms]
    counts = np.bincount(np.concatenate([pairs[row] for row in sample]), minlength=num_terms)
    counts[(counts < 3) | (counts > LEXICON_COMMON * len(sample))] = 0
    frequent = np.argsort(-counts, kind="stable")[:LEXICON_WORDS]
    frequent = frequent[counts[frequent] > 0]
    places = np.full(num_terms, -1, dtype=np.int32)
    places[frequent] = np.arange(len(frequent))
    known = {"pair": pairs, "prompt": [row[0] for row in terms], "answer": [row[1] for row in terms]}
    return {part: [(found := places[ids])[found >= 0] for ids in rows] for part, rows in known.items()}


def _rows_with(terms: Sequence[np.ndarray], sample: Sequence[int]) -> np.ndarray:
    joined = np.concatenate([terms[row] for row in sample])
    return np.bincount(joined, minlength=LEXICON_WORDS).astype(np.float32)


def _rows_with_both(target: Sequence[np.ndarray], english: Sequence[np.ndarray], sample: Sequence[int]) -> np.ndarray:
    """Number of sampled rows that have both words, shape (English words, target words)."""
    together = np.zeros((LEXICON_WORDS, LEXICON_WORDS), dtype=np.float32)
    for start in range(0, len(sample), 1024):
        part = sample[start : start + 1024]
        present = np.zeros((2, len(part), LEXICON_WORDS), dtype=np.float32)
        for place, row in enumerate(part):
            present[0, place, english[row]] = 1
            present[1, place, target[row]] = 1
        together += present[0].T @ present[1]
    return together
