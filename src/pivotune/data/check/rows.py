"""Checks of one row alone (damaged, copied, wrong language, repeated) and of a row against all others.

The latter find slipped rows, cut answers, unusual length ratios, and rows that are no translation of their English.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from pivotune.data.check.cuts import CutTable
from pivotune.data.check.damage import find_damage, lost_number
from pivotune.data.check.language import ENGLISH_WORDS, Detector, Text, side_texts
from pivotune.data.check.lexicon import Strange, TermTable, stranger_pairs
from pivotune.data.check.result import DEFECTS, Findings, Shift
from pivotune.data.check.shifts import RATIO_CHARACTERS, TraceTable, disagreements, find_shifts, side_trace
from pivotune.data.formats import row_name
from pivotune.data.rows import Row

# A copy may lose or change a word or two; translations share far fewer, even into related languages.
COPY_SIMILARITY = 0.8
# Shorter copies are names, titles and terms, which stay as they are in many translations.
COPY_WORDS = 3
# Robust z-score of the log length ratio. Ratios have long tails: the usual 3.5 flags hundreds of good rows in 30,000.
RATIO_Z = 6.0
# And at least this factor away from the usual ratio, for files with ratios that hardly scatter.
RATIO_FACTOR = 2.5
# The spread is estimated among this many rows of similar length: ratios of short texts scatter more.
RATIO_ROWS = 500
# Signals that a row needs to be flagged where no lexicon can be learned, and beside a lexicon that finds no fault.
SIGNALS_ALONE, SIGNALS_BESIDE_LEXICON = 2, 3


class RowCheck:
    """Checks one row after the other, and keeps of each row the traces that the comparison of rows needs.

    That is some tens of bytes a row, and the words of at most `LEXICON_COMPARED` rows spread over the data.

    Args:
        sources: the sources of the rows, as in `Rows.sources`.
    """

    def __init__(self, language: str, found: Findings, num_rows: int, sources: Mapping[str, int]) -> None:
        self._found, self._sources = found, sources
        self._detector = Detector(language)
        # 64-bit hashes of prompts, of whole target sides and of English sides, to find repetitions.
        self._prompts, self._targets, self._english = array("q"), array("q"), array("q")
        self.terms = TermTable(num_rows)
        self.traces = TraceTable()
        self.cuts = CutTable()
        self.lost_numbers = array("q")
        # The rows' places in their sources.
        self._numbers = array("q")

    def name(self, index: int) -> int | str:
        """Return the number of a row in its source, `b.jsonl:3` with several sources."""
        return row_name(self._numbers[index], self._sources)

    def add(self, row: Row) -> None:
        """Check the next row."""
        index, detector = len(self._numbers), self._detector
        self._numbers.append(row.number)
        prompt = hash((row.prompt, row.input, str(row.history) if row.history else ""))
        self._prompts.append(prompt)
        self._targets.append(hash((prompt, row.completion)))
        self._english.append(hash((row.prompt_en, row.input_en, row.completion_en, str(row.history_en))))
        target, english = side_texts(row)
        copied_prompt, copied_answer = (_is_copy(one, other) for one, other in zip(target, english, strict=True))
        is_untranslated = copied_prompt or (target[0].words == english[0].words and detector.is_english(english[0]))
        for kind, note in find_damage(target, english, row):
            if not (is_untranslated and kind == "left_in_english"):
                self._found.add(kind, index, note)
        if is_untranslated:
            note = "prompt and answer" if copied_answer else "the prompt"
            self._found.add("untranslated", index, note, float(copied_answer))
        else:
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
        if index % self.terms.step == 0:
            self.terms.append(target, english)
        self.traces.append(side_trace(target), side_trace(english))
        self.cuts.append(row.completion, row.completion_en)
        if lost_number(target, english):
            self.lost_numbers.append(index)

    def check_repeats(self) -> None:
        """Flag exact duplicates; among the others, earlier prompts with another answer and earlier English sides."""
        targets, prompts, english = map(_first_places, (self._targets, self._prompts, self._english))
        places = np.arange(len(self._numbers))
        is_repeated = targets < places
        for kind, first, title in (
            ("duplicate_rows", targets, "same as"),
            ("same_prompt", np.where(is_repeated, places, prompts), "prompt of"),
            ("duplicate_english", np.where(is_repeated, places, english), "English of"),
        ):
            for index in np.flatnonzero(first < places).tolist():
                self._found.add(kind, index, f"{title} row {self.name(int(first[index]))}")

    def notes(self) -> list[str]:
        """Return the checks that were not possible, and doubts about the language asked for."""
        notes = self._detector.notes()
        if self.terms.step > 1:
            notes.append(
                f"words were compared on {len(self.terms.target):,} of {len(self._numbers):,} rows, spread over the data: "
                "among the others misaligned pairs are found by numbers, links, lists and lengths only"
            )
        return notes


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
    """Flag slipped stretches, length ratios and misaligned pairs; return the stretches."""
    shifts = find_shifts(checked.traces)
    for stretch, by in shifts:
        for index in stretch:
            english = checked.name(min(max(index + by, 0), len(rows) - 1))
            found.add("shifted", index, f"its English is rather that of row {english}", -index)
    # Damage, a slip and another language explain odd lengths and words.
    explained = found.flagged(DEFECTS, len(rows))
    outliers = _ratio_outliers(checked.traces)
    unusual = np.zeros(len(rows), dtype=bool)
    unusual[list(outliers)] = True
    # Misaligned: strangers by the lexicon, or several signals at once.
    strangers = stranger_pairs(checked.terms, explained)
    needed = SIGNALS_ALONE if strangers is None else SIGNALS_BESIDE_LEXICON
    strange = strangers or {}
    signals = np.frombuffer(checked.traces.signals, dtype=np.uint8) + unusual
    suspects = signals >= needed
    suspects[list(strange)] = True
    for index in np.flatnonzero(suspects & ~explained).tolist():
        excess = strange[index].excess if index in strange else 0
        note = partial(_why_misaligned, rows, index, strange.get(index), bool(unusual[index]))
        found.add("misaligned", index, note, int(signals[index]) + excess)
    explained |= found.flagged(["misaligned"], len(rows))
    for index, note in checked.cuts.cut_answers(explained).items():
        found.add("cut_answer", index, note)
    explained |= found.flagged(["cut_answer"], len(rows))
    for index in checked.lost_numbers:
        if not explained[index]:
            found.add("lost_number", index, partial(_lost_number, rows, index))
    explained |= found.flagged(["lost_number"], len(rows))
    for index in np.flatnonzero(unusual & ~explained).tolist():
        factor = outliers[index]
        found.add("length_ratio", index, f"target {factor:.2g} times as long as usual", abs(math.log(factor)))
    return [Shift(checked.name(part[0]), checked.name(part[-1]), by, len(part)) for part, by in shifts]


def _lost_number(rows: Sequence[Row], index: int) -> str:
    return lost_number(*side_texts(rows[index]))


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
