"""Checks of one row alone (copied, wrong language, HTML escapes, repeated) and of a row against all others.

The latter find slipped rows, unusual length ratios, and rows that are no translation of their English: for these a small
word lexicon is learned from the pairs themselves.
"""

from __future__ import annotations

import math
import random
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from pivotune.data.check.language import ENGLISH_WORDS, Detector, Text, side_texts
from pivotune.data.check.result import Findings, Shift
from pivotune.data.check.shifts import RATIO_CHARACTERS, TraceTable, disagreements, find_shifts, side_trace
from pivotune.data.rows import Row

# A copy may lose or change a word or two; translations share far fewer, even into related languages.
COPY_SIMILARITY = 0.8
# Shorter copies are names, titles and terms, which stay as they are in many translations.
COPY_WORDS = 3
# The lexicon judges this many rows at most: their words take some hundred megabytes.
LEXICON_COMPARED = 100_000
_HTML_ESCAPE = re.compile(r"&(?:lt|gt|amp|quot|apos|nbsp|#\d+);")
# Robust z-score of the log length ratio. Ratios have long tails: the usual 3.5 flags hundreds of good rows in 30,000.
RATIO_Z = 6.0
# And at least this factor away from the usual ratio, for files with ratios that hardly scatter.
RATIO_FACTOR = 2.5
# The spread is estimated among this many rows of similar length: ratios of short texts scatter more.
RATIO_ROWS = 500
# Signals that a row needs to be flagged where no lexicon can be learned, and beside a lexicon that finds no fault.
SIGNALS_ALONE, SIGNALS_BESIDE_LEXICON = 2, 3
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
# Good rows hardly ever agree less than this share of strangers, so the rows below it give the number of strangers.
LEXICON_SURE = 0.3
# The strangers' agreement is estimated on this many rows.
LEXICON_PROBES = 1_000


class RowCheck:
    """Checks one row after the other, and keeps of each row the traces that the comparison of rows needs.

    That is some tens of bytes a row, and the words of at most `LEXICON_COMPARED` rows spread over the data.

    Attributes:
        numbers: int64 for each row, its place in the source.
        terms, terms_en: numbers of the terms of prompt and answer, of every `terms_step`-th row.
        term_ids: the number of each term.
    """

    def __init__(self, language: str, found: Findings, num_rows: int) -> None:
        self._found = found
        self._detector = Detector(language)
        self.term_ids: dict[str, int] = {}
        # 64-bit hashes of prompts, of whole target sides and of English sides, to find repetitions.
        self._prompts, self._targets, self._english = array("q"), array("q"), array("q")
        self.terms_step = math.ceil(num_rows / LEXICON_COMPARED)
        self.terms: list[list[np.ndarray]] = []
        self.terms_en: list[list[np.ndarray]] = []
        self.traces = TraceTable()
        self.numbers = array("q")

    def add(self, row: Row) -> None:
        """Check the next row."""
        index, detector = len(self.numbers), self._detector
        self.numbers.append(row.number)
        prompt = hash((row.prompt, row.input, str(row.history) if row.history else ""))
        self._prompts.append(prompt)
        self._targets.append(hash((prompt, row.completion)))
        self._english.append(hash((row.prompt_en, row.input_en, row.completion_en, str(row.history_en))))
        target, english = side_texts(row)
        escapes = [match.group() for text in target for match in _HTML_ESCAPE.finditer(text.text)]
        if escapes and not any(_HTML_ESCAPE.search(text.text) for text in english):
            self._found.add("html_escapes", index, " ".join(dict.fromkeys(escapes)), len(escapes))
        copied_prompt, copied_answer = (_is_copy(one, other) for one, other in zip(target, english, strict=True))
        if copied_prompt or (target[0].words == english[0].words and detector.is_english(english[0])):
            note = "prompt and answer" if copied_answer else "the prompt"
            self._found.add("untranslated", index, note, float(copied_answer))
        else:
            if copied_answer:
                self._found.add("copied_answer", index, "the answer")
            if detector.knows_target:
                for name, one, other in zip(("prompt", "answer"), target, english, strict=True):
                    if guess := detector.foreign(one, without=other):
                        self._found.add("wrong_language", index, f"{name} looks like {guess.label}", guess.score)
            if target[0].words == english[0].words and detector.may_be_foreign(english[0]):
                self._found.add("english_not_english", index, "prompt is the same as the target's", 1.0)
            for name, text in zip(("prompt", "answer"), english, strict=True):
                guess = detector.not_english(text)
                # An English task may ask for an answer in a third language ("Translate into French").
                if guess and (name == "prompt" or detector.is_target(guess.label)):
                    self._found.add("english_not_english", index, f"{name} looks like {guess.label}", guess.score)
        if index % self.terms_step == 0:
            self.terms.append(self._ids(target))
            self.terms_en.append(self._ids(english))
        self.traces.append(side_trace(target), side_trace(english))

    def check_repeats(self) -> None:
        """Flag exact duplicates; among the others, earlier prompts with another answer and earlier English sides."""
        targets, prompts, english = map(_first_places, (self._targets, self._prompts, self._english))
        places = np.arange(len(self.numbers))
        is_repeated = targets < places
        for kind, first, title in (
            ("duplicate_rows", targets, "same as"),
            ("same_prompt", np.where(is_repeated, places, prompts), "prompt of"),
            ("duplicate_english", np.where(is_repeated, places, english), "English of"),
        ):
            for index in np.flatnonzero(first < places).tolist():
                self._found.add(kind, index, f"{title} row {self.numbers[int(first[index])]}")

    def notes(self) -> list[str]:
        """Return the checks that were not possible, and doubts about the language asked for."""
        notes = self._detector.notes()
        if self.terms_step > 1:
            notes.append(
                f"words were compared on {len(self.terms):,} of {len(self.numbers):,} rows, spread over the data: among "
                "the others misaligned pairs are found by numbers, links, lists and lengths only"
            )
        return notes

    def _ids(self, texts: list[Text]) -> list[np.ndarray]:
        """Return the numbers of the different terms of prompt and answer."""
        ids = self.term_ids
        # In one order: that of a set differs from process to process.
        terms = (sorted(text.terms()) for text in texts)
        return [np.array([ids.setdefault(term, len(ids)) for term in each], dtype=np.int32) for each in terms]


def _is_copy(target: Text, english: Text) -> bool:
    """Return True if the target's words are those of an English sentence, give or take a few."""
    if len(english.words) < COPY_WORDS or ENGLISH_WORDS.isdisjoint(target.words):
        return False
    if not COPY_SIMILARITY <= len(target.words) / len(english.words) <= 1 / COPY_SIMILARITY:
        return False
    shared = (Counter(target.words) & Counter(english.words)).total()
    return 2 * shared >= COPY_SIMILARITY * (len(target.words) + len(english.words)) and not english.is_code()


def _first_places(hashes: array) -> np.ndarray:
    """Return for each row the first place with the same hash, int64 (rows,)."""
    _, first, inverse = np.unique(np.frombuffer(hashes, dtype=np.int64), return_index=True, return_inverse=True)
    return first[inverse]


def check_pairs(rows: Sequence[Row], checked: RowCheck, found: Findings) -> list[Shift]:
    """Flag slipped stretches, length ratios and misaligned pairs; return the stretches, with 0-based places."""
    shifts = find_shifts(checked.traces)
    for shift in shifts:
        for index in range(shift.first, shift.last + 1):
            english = checked.numbers[min(max(index + shift.by, 0), len(rows) - 1)]
            found.add("shifted", index, f"its English is rather that of row {english}", -index)
    for index, factor in sorted(_ratio_outliers(checked.traces).items()):
        found.add("length_ratio", index, f"target {factor:.2g} times as long as usual", abs(math.log(factor)))
    # Misaligned: strangers by the lexicon, or several signals at once.
    explained = found.flagged(("shifted", "untranslated", "wrong_language"), len(rows))
    strangers = stranger_pairs(checked, explained)
    needed = SIGNALS_ALONE if strangers is None else SIGNALS_BESIDE_LEXICON
    strange = strangers or {}
    unusual = found.flagged(["length_ratio"], len(rows))
    signals = np.frombuffer(checked.traces.signals, dtype=np.uint8) + unusual
    suspects = signals >= needed
    suspects[list(strange)] = True
    for index in np.flatnonzero(suspects & ~explained).tolist():
        excess = strange[index].excess if index in strange else 0
        note = partial(_why_misaligned, rows, index, strange.get(index), bool(unusual[index]))
        found.add("misaligned", index, note, int(signals[index]) + excess)
    return shifts


def _why_misaligned(rows: Sequence[Row], index: int, strange: Strange | None, unusual_length: bool) -> str:
    words = [f"words of the {strange.part} do not belong to the English ones"] if strange else []
    signals = disagreements(*map(side_trace, side_texts(rows[index])))
    return "; ".join([*words, *signals, *["length ratio"] * unusual_length])


def _ratio_outliers(traces: TraceTable) -> dict[int, float]:
    """Return the rows whose length ratio is far from that of rows of similar length: index -> ratio over the usual one."""
    target, english = np.log(traces.characters().sum(axis=2) + RATIO_CHARACTERS).T
    ratio, outliers = target - english, {}
    order = np.argsort(target + english, kind="stable")
    for part in np.array_split(order, max(1, len(order) // RATIO_ROWS)):
        distance = ratio[part] - np.median(ratio[part])
        # 1.4826 makes the median absolute deviation the standard deviation of a normal distribution.
        spread = 1.4826 * np.median(np.abs(distance))
        far = np.abs(distance) > max(RATIO_Z * spread, math.log(RATIO_FACTOR))
        outliers.update(zip(part[far].tolist(), np.exp(distance[far]).tolist(), strict=True))
    # Code is as long on both sides in any language.
    return {index: factor for index, factor in outliers.items() if not traces.is_code[index]}


class Strange(NamedTuple):
    """The `part` of a row (`pair`, `prompt` or `answer`) that agrees no better than strangers, and the gap to the limit."""

    part: str
    excess: float


def stranger_pairs(checked: RowCheck, left_out: np.ndarray) -> dict[int, Strange] | None:
    """Return the rows whose texts agree with their English no better than with another row's; None if undecidable.

    Rows in `left_out`, bool (rows,), are skipped.
    """
    learned = np.flatnonzero(~left_out[:: checked.terms_step]).tolist()
    if len(learned) < LEXICON_ROWS:
        return None
    lexicon = _Lexicon(checked, learned)
    whole = lexicon.strangers("pair")
    if whole is None:
        return None
    parts = {name: lexicon.strangers(name) or {} for name in ("answer", "prompt")} | {"pair": whole}
    return {
        place * checked.terms_step: Strange(name, excess)
        for name, part in parts.items()
        for place, excess in part.items()
    }


class _Lexicon:
    """Pairs of words that belong together, counted in the rows themselves.

    Association of two words is the Dice coefficient of the sets of rows that hold them, the row in question left out.
    Agreement of two texts is the mean over all known words of the best association with a word of the other text. Rows are
    judged by their gain: the difference to the agreement with English texts of other rows of similar length.
    """

    def __init__(self, checked: RowCheck, learned: Sequence[int]) -> None:
        self._random = random.Random(0)
        self._learned = learned
        sample = learned[:: math.ceil(len(learned) / LEXICON_SAMPLE)]
        self._sample = frozenset(sample)
        self._target = _known_terms(checked.terms, sample, len(checked.term_ids))
        self._english = _known_terms(checked.terms_en, sample, len(checked.term_ids))
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
        limit = _precise_limit(np.array(list(gains.values())), strange)
        return {row: limit - gain for row, gain in gains.items() if gain < limit}

    def _agreement(self, target: np.ndarray, english: np.ndarray, own: int) -> float:
        """Return the agreement of two texts; `own` is 1 where their row is in the sample and must be left out."""
        together = self._together[english[:, None], target] - own
        either = self._counts_en[english][:, None] + self._counts[target] - 2 * own
        dice = together / np.maximum(either, 1)
        return float(dice.max(axis=0).sum() / len(target) + dice.max(axis=1).sum() / len(english))


def _precise_limit(gains: np.ndarray, strange: np.ndarray) -> float:
    """Return the highest limit below which most rows are strangers.

    A share q of all strangers gains less than the q-quantile of `strange`. The rows below a quantile that good rows do not
    reach thus give the number of strangers, and with it the number of strangers below any other quantile.
    """
    strangers = (gains < np.quantile(strange, LEXICON_SURE)).sum() / LEXICON_SURE
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
