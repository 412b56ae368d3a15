"""Checks of one row alone, or of its repetition: copied, in the wrong language, escaped, seen before."""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter

import numpy as np

from pivotune.data.check.findings import Findings
from pivotune.data.check.language import Detector
from pivotune.data.check.repeats import Repeats
from pivotune.data.check.text import ENGLISH_WORDS, Text, query_text, query_text_en
from pivotune.data.check.traces import Trace, TraceTable, side_trace
from pivotune.data.rows import Row

# A copy may lose or change a word or two; translations share far fewer, even into related languages.
COPY_SIMILARITY = 0.8
# Shorter copies are names, titles and terms, which stay as they are in many translations.
COPY_WORDS = 3
# The lexicon judges this many rows at most: their words take some hundred megabytes.
LEXICON_COMPARED = 100_000
_HTML_ESCAPE = re.compile(r"&(?:lt|gt|amp|quot|apos|nbsp|#\d+);")


class TextCheck:
    """Checks that need one row, or its repetition; keeps of each row what the comparison of rows needs.

    That is some tens of bytes a row, and the words of at most `LEXICON_COMPARED` rows spread over the data.

    Attributes:
        numbers: int64 for each row, its place in the source.
        traces: of all rows.
        terms, terms_en: numbers of the terms of prompt and answer, of every `terms_step`-th row.
    """

    def __init__(self, language: str, found: Findings, num_rows: int) -> None:
        self._language = language
        self._found = found
        self._detector = Detector(language)
        self._term_ids: dict[str, int] = {}
        self._num_rows = num_rows
        self._repeats = Repeats()
        self.terms_step = math.ceil(num_rows / LEXICON_COMPARED)
        self.terms: list[tuple[np.ndarray, np.ndarray]] = []
        self.terms_en: list[tuple[np.ndarray, np.ndarray]] = []
        self.traces = TraceTable()
        self.numbers = array("q")

    def add(self, row: Row) -> None:
        """Check the next row alone."""
        index = len(self.numbers)
        self.numbers.append(row.number)
        self._repeats.append(row)
        target = [Text(query_text(row)), Text(row.completion)]
        english = [Text(query_text_en(row)), Text(row.completion_en)]
        self._check_copies(index, target, english)
        self._check_escapes(index, target, english)
        self._check_target(index, target, english)
        self._check_english(index, target, english)
        if index % self.terms_step == 0:
            self.terms.append(self._ids(target))
            self.terms_en.append(self._ids(english))
        self.traces.append(Trace(side_trace(target), side_trace(english)))

    def check_repeats(self) -> None:
        """Flag the rows that repeat an earlier one, when all have been added."""
        self._repeats.flag(self._found, self.numbers)

    @property
    def num_terms(self) -> int:
        return len(self._term_ids)

    def notes(self) -> list[str]:
        """What could not be checked, and doubts about the language asked for."""
        notes = self._detector.notes(self._language)
        if self.terms_step > 1:
            notes.append(
                f"words were compared on {len(self.terms):,} of {self._num_rows:,} rows, spread over the data: among the "
                "others misaligned pairs are found by numbers, links, lists and lengths only"
            )
        return notes

    def _check_copies(self, index: int, target: list[Text], english: list[Text]) -> None:
        prompt, answer = (_is_copy(one, other) for one, other in zip(target, english, strict=True))
        prompt = prompt or (target[0].words == english[0].words and self._detector.is_english(english[0]))
        if prompt:
            self._found.add("untranslated", index, "prompt and answer" if answer else "the prompt", float(answer))
        elif answer:
            self._found.add("copied_answer", index, "the answer")

    def _check_escapes(self, index: int, target: list[Text], english: list[Text]) -> None:
        escapes = [match.group() for text in target for match in _HTML_ESCAPE.finditer(text.text)]
        if escapes and not any(_HTML_ESCAPE.search(text.text) for text in english):
            self._found.add("html_escapes", index, " ".join(dict.fromkeys(escapes)), len(escapes))

    def _check_target(self, index: int, target: list[Text], english: list[Text]) -> None:
        if self._found.is_last("untranslated", index) or not self._detector.knows_target:
            return
        for name, one, other in zip(("prompt", "answer"), target, english, strict=True):
            guess = self._detector.foreign(one, without=other)
            if guess:
                self._found.add("wrong_language", index, f"{name} looks like {guess.label}", guess.score)

    def _check_english(self, index: int, target: list[Text], english: list[Text]) -> None:
        if self._found.is_last("untranslated", index):
            return
        if target[0].words == english[0].words and self._detector.may_be_foreign(english[0]):
            self._found.add("english_not_english", index, "prompt is the same as the target's", 1.0)
        prompt, answer = map(self._detector.not_english, english)
        if prompt:
            self._found.add("english_not_english", index, f"prompt looks like {prompt.label}", prompt.score)
        # An English task may ask for an answer in a third language ("Translate into French").
        elif answer and self._detector.is_target(answer.label):
            self._found.add("english_not_english", index, f"answer looks like {answer.label}", answer.score)

    def _ids(self, texts: list[Text]) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the different terms of prompt and answer."""
        ids = self._term_ids
        prompt, answer = ([ids.setdefault(term, len(ids)) for term in text.terms()] for text in texts)
        return np.array(prompt, dtype=np.int32), np.array(answer, dtype=np.int32)


def _is_copy(target: Text, english: Text) -> bool:
    """Whether the target's words are those of an English sentence, give or take a few."""
    if len(english.words) < COPY_WORDS or ENGLISH_WORDS.isdisjoint(target.words):
        return False
    if not COPY_SIMILARITY <= len(target.words) / len(english.words) <= 1 / COPY_SIMILARITY:
        return False
    shared = (Counter(target.words) & Counter(english.words)).total()
    return 2 * shared >= COPY_SIMILARITY * (len(target.words) + len(english.words)) and not english.is_code()
