"""Checks of one row alone, or of its repetition: copied from English, wrong language, HTML escapes, repeated."""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter

import numpy as np

from pivotune.data.check.language import ENGLISH_WORDS, Detector, Text, side_texts
from pivotune.data.check.result import Findings
from pivotune.data.check.shifts import TraceTable, side_trace
from pivotune.data.rows import Row

# A copy may lose or change a word or two; translations share far fewer, even into related languages.
COPY_SIMILARITY = 0.8
# Shorter copies are names, titles and terms, which stay as they are in many translations.
COPY_WORDS = 3
# The lexicon judges this many rows at most: their words take some hundred megabytes.
LEXICON_COMPARED = 100_000
_HTML_ESCAPE = re.compile(r"&(?:lt|gt|amp|quot|apos|nbsp|#\d+);")


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
        return [np.array([ids.setdefault(term, len(ids)) for term in text.terms()], dtype=np.int32) for text in texts]


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
