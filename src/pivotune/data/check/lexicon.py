"""A small word lexicon, learned from the pairs themselves, and the rows that are no translation of their English by it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pivotune.data.check.language import Text

# The lexicon judges this many rows at most: their words take some hundred megabytes.
LEXICON_COMPARED = 100_000
# Smaller files teach no lexicon; only the row's own signals are used for them.
LEXICON_ROWS = 200
# Enough to learn the frequent words; more costs time and finds no more.
LEXICON_SAMPLE, LEXICON_WORDS = 8_000, 2_000
# Words in more rows than this, such as articles, are in every pair and tell pairs apart badly.
LEXICON_COMMON = 0.2
# A row needs this many known words on both sides to be judged.
LEXICON_TERMS = 4
# A row is flagged if it agrees with its English no better than this share of rows agrees with an unrelated text. The
# largest share is taken whose flagged rows are misaligned with the estimated precision `LEXICON_PRECISION` or better.
LEXICON_SHARES, LEXICON_PRECISION = (0.97, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3), 0.9
# Good rows hardly ever agree less than this share of strangers, so the rows below it give the number of strangers. Some
# good rows are below it all the same (loose translations, puzzles about words): up to two in Vietnamese and Chinese files
# of 300 rows, which teach a poor lexicon, and 3 more in 10,000.
LEXICON_SURE, LEXICON_STRAYS, LEXICON_STRAY_SHARE = 0.3, 2, 3e-4
# The strangers' agreement is estimated on this many rows.
LEXICON_PROBES = 1_000


class TermTable:
    """The different terms of prompt and answer of every `step`-th row, as numbers, on both sides.

    Attributes:
        ids: the number of each term.
        target, english: for each of these rows, the terms of its prompt and of its answer.
    """

    def __init__(self, num_rows: int) -> None:
        self.step = math.ceil(num_rows / LEXICON_COMPARED)
        self.ids: dict[str, int] = {}
        self.target: list[list[np.ndarray]] = []
        self.english: list[list[np.ndarray]] = []

    def append(self, target: list[Text], english: list[Text]) -> None:
        """Add the terms of the next row of the table."""
        self.target.append(self._numbers(target))
        self.english.append(self._numbers(english))

    def _numbers(self, texts: list[Text]) -> list[np.ndarray]:
        # In one order: that of a set differs from process to process.
        terms = (sorted(text.terms()) for text in texts)
        return [np.array([self.ids.setdefault(term, len(self.ids)) for term in each], dtype=np.int32) for each in terms]


class Strange(NamedTuple):
    """The `part` of a row (`pair`, `prompt` or `answer`) that agrees no better than strangers, and the gap to the limit."""

    part: str
    excess: float


def stranger_pairs(terms: TermTable, left_out: np.ndarray) -> dict[int, Strange] | None:
    """Return the rows whose texts agree with their English no better than with another row's; None if undecidable.

    Rows in `left_out`, bool (rows,), are skipped.
    """
    learned = np.flatnonzero(~left_out[:: terms.step]).tolist()
    if len(learned) < LEXICON_ROWS:
        return None
    lexicon = _Lexicon(terms, learned)
    whole = lexicon.strangers("pair")
    if whole is None:
        return None
    parts = {name: lexicon.strangers(name) or {} for name in ("answer", "prompt")} | {"pair": whole}
    return {place * terms.step: Strange(name, excess) for name, part in parts.items() for place, excess in part.items()}


class _Lexicon:
    """Pairs of words that belong together, counted in the rows themselves.

    Association of two words is the Dice coefficient of the sets of rows that hold them, the row in question left out.
    Agreement of two texts is the mean over all known words of the best association with a word of the other text. Rows are
    judged by their gain: the difference to the agreement with English texts of other rows of similar length.
    """

    def __init__(self, terms: TermTable, learned: Sequence[int]) -> None:
        self._random = random.Random(0)
        self._learned = learned
        sample = learned[:: math.ceil(len(learned) / LEXICON_SAMPLE)]
        self._sample = frozenset(sample)
        self._target = _known_terms(terms.target, sample, len(terms.ids))
        self._english = _known_terms(terms.english, sample, len(terms.ids))
        # Numbers of sampled rows: with both words (English words, target words), and with each word.
        self._together = np.zeros((LEXICON_WORDS, LEXICON_WORDS), dtype=np.float32)
        self._counts, self._counts_en = np.zeros((2, LEXICON_WORDS), dtype=np.float32)
        for start in range(0, len(sample), 1024):
            english, target = np.zeros((2, len(sample[start : start + 1024]), LEXICON_WORDS), dtype=np.float32)
            for index, row in enumerate(sample[start : start + 1024]):
                english[index, self._english["pair"][row]] = 1
                target[index, self._target["pair"][row]] = 1
            self._together += english.T @ target
            self._counts += target.sum(axis=0)
            self._counts_en += english.sum(axis=0)

    def strangers(self, part: str) -> dict[int, float] | None:
        """Return the rows that agree no better than strangers -> the gap; None if the lexicon cannot separate them."""
        target, english = self._target[part], self._english[part]
        judged = [row for row in self._learned if min(len(target[row]), len(english[row])) >= LEXICON_TERMS]
        if len(judged) < LEXICON_ROWS // 2:
            return None
        by_length = sorted(judged, key=lambda row: len(english[row]))
        place = {row: index for index, row in enumerate(by_length)}

        def stranger(row: int) -> int:
            """Return another row whose English has about as many words."""
            distance = self._random.choice((-1, 1)) * self._random.randint(1, 50)
            return by_length[(place[row] + distance) % len(by_length)]

        def agreement(row: int, other: int) -> float:
            return self._agreement(target[row], english[other], int(row == other and row in self._sample))

        def with_strangers(row: int) -> float:
            return sum(agreement(row, stranger(row)) for _ in range(3)) / 3

        probe = judged[:: math.ceil(len(judged) / LEXICON_PROBES)]
        strange = np.array([agreement(row, stranger(row)) - with_strangers(row) for row in probe])
        own = np.array([agreement(row, row) - with_strangers(row) for row in probe])
        if np.median(own) <= np.quantile(strange, 0.99):
            return None
        most = float(np.quantile(strange, max(LEXICON_SHARES)))
        # Most rows agree better than any stranger could, and need no comparison.
        agreements = {row: agreement(row, row) for row in by_length}
        enough = most + max(map(with_strangers, by_length[:: math.ceil(len(by_length) / LEXICON_PROBES)]))
        gains = {row: own - with_strangers(row) for row, own in agreements.items() if own < enough}
        gains = {row: gain for row, gain in gains.items() if gain < most}
        limit = _precise_limit(
            np.array(list(gains.values())), strange, LEXICON_STRAYS + LEXICON_STRAY_SHARE * len(judged)
        )
        return {row: limit - gain for row, gain in gains.items() if gain < limit}

    def _agreement(self, target: np.ndarray, english: np.ndarray, own: int) -> float:
        """Return the agreement of two texts; `own` is 1 where their row is in the sample and must be left out."""
        together = self._together[english[:, None], target] - own
        either = self._counts_en[english][:, None] + self._counts[target] - 2 * own
        dice = together / np.maximum(either, 1)
        return float(dice.max(axis=0).sum() / len(target) + dice.max(axis=1).sum() / len(english))


def _precise_limit(gains: np.ndarray, strange: np.ndarray, strays: float) -> float:
    """Return the highest limit below which most rows are strangers.

    A share q of all strangers gains less than the q-quantile of `strange`. The rows below a quantile that good rows do not
    reach thus give the number of strangers, and with it the number of strangers below any other quantile.
    """
    strangers = ((gains < np.quantile(strange, LEXICON_SURE)).sum() - strays) / LEXICON_SURE
    for share in LEXICON_SHARES:
        limit = float(np.quantile(strange, share))
        if share * strangers >= LEXICON_PRECISION * (gains < limit).sum():
            return limit
    return -math.inf


def _known_terms(
    terms: Sequence[list[np.ndarray]], sample: Sequence[int], num_terms: int
) -> dict[str, list[np.ndarray]]:
    """Return the terms of prompts, answers and both as indices of the lexicon, which holds the most frequent terms."""
    pairs = [np.union1d(prompt, answer) for prompt, answer in terms]
    counts = np.bincount(np.concatenate([pairs[row] for row in sample]), minlength=num_terms)
    counts[(counts < 3) | (counts > LEXICON_COMMON * len(sample))] = 0
    frequent = np.argsort(-counts, kind="stable")[:LEXICON_WORDS]
    frequent = frequent[counts[frequent] > 0]
    places = np.full(num_terms, -1, dtype=np.int32)
    places[frequent] = np.arange(len(frequent))
    known = {"pair": pairs, "prompt": [row[0] for row in terms], "answer": [row[1] for row in terms]}
    return {part: [(found := places[ids])[found >= 0] for ids in rows] for part, rows in known.items()}
