"""The whole check: every row alone (damaged, copied, wrong language, repeated), then against all others, and the verdict.

The latter finds slipped rows, cut answers, unusual length ratios, and rows that are no translation of their English.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from pivotune.data.check.cuts import CutTable
from pivotune.data.check.damage import find_damage, lost_number
from pivotune.data.check.language import ENGLISH_WORDS, Detector, Text, side_texts
from pivotune.data.check.lexicon import Strange, TermTable, stranger_pairs
from pivotune.data.check.result import DEFECTS, TEXTS, DataCheck, Findings, Histogram, Lengths, Shift
from pivotune.data.check.shifts import RATIO_CHARACTERS, TraceTable, disagreements, find_shifts, side_trace
from pivotune.data.examples import Encoder, Pair
from pivotune.data.formats import row_name
from pivotune.data.lazy import Subset
from pivotune.data.rows import Row
from pivotune.data.sources import Rows
from pivotune.errors import UsageError
from pivotune.text.languages import is_english

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
# Tokens are counted on this many rows at most, spread over the data: shares are then off by half a percentage point, and
# the tokenizer, by far the slowest part, takes seconds for a file of any size.
TOKENIZED_ROWS = 10_000
_BINS = 30
_ROWS_PER_STEP = 512  # between two calls of `progress`


def check_rows(
    rows: Sequence[Row],
    *,
    language: str,
    encoder: Encoder | None = None,
    examples: int = 3,
    progress: Callable[[int], None] | None = None,
) -> DataCheck:
    """Check parallel rows.

    Args:
        rows: rows with all four texts, best from `load_rows(..., on_bad_row="skip")`, which counts the others.
        language: code of the target language: `vi`, `zh-Hans`, `pt_BR`, `vie_Latn`...
        encoder: the tokenizer, template and limits of the training to come; without it lengths are in characters.
        examples: flagged rows to keep for each kind of problem.
        progress: called with the number of rows done so far.

    Raises:
        UsageError: no rows, a row that lacks a text, or English as the target language.
    """
    if is_english(language):
        raise UsageError(
            f"language: {language} is English, which is the other side of every row; name the target language"
        )
    if not rows:
        raise UsageError("data check: there are no rows")
    read = rows if isinstance(rows, Rows) else Rows(rows, {"the given rows": 0}, len(rows))
    found = Findings(examples)
    checked = RowCheck(language, found, len(rows), read.sources)
    for done, row in enumerate(rows, start=1):
        if not all(turn.is_whole for turn in row.sides):
            raise UsageError(f"data check: row {row.number} lacks a text; load the rows with on_bad_row='skip'")
        checked.add(row)
        if progress and (done % _ROWS_PER_STEP == 0 or done == len(rows)):
            progress(done)
    checked.check_repeats()
    shifts = check_pairs(rows, checked, found)
    return DataCheck(
        source=read.source,
        language=language,
        total=read.total,
        usable=len(rows),
        skipped=dict(read.skipped),
        skipped_at=dict(read.skipped_at),
        problems=found.problems(rows, checked.name),
        shifts=shifts,
        notes=[*checked.notes(), *read.notes],
        flagged=int(found.flagged(DEFECTS, len(rows)).sum()),
        **_measure(rows, checked, encoder),
    )


def _measure(rows: Sequence[Row], checked: RowCheck, encoder: Encoder | None) -> dict[str, Any]:
    """Return `unit`, `measured`, `lengths`, `histograms`, `cut` and `too_long` of the `DataCheck`."""
    characters = checked.traces.characters().reshape(-1, 4)
    lengths, tokenized, cut, too_long = characters, rows, None, {}
    if encoder:
        tokenized = Subset(rows, np.arange(0, len(rows), math.ceil(len(rows) / TOKENIZED_ROWS)))
        meter = _MeasuringEncoder(encoder.tokenizer, encoder.template, encoder.limits, fold_system=encoder.fold_system)
        for _ in meter.encode_lazily(tokenized, on_bad_row="skip"):
            pass
        lengths = np.frombuffer(meter.lengths, dtype=np.int32).reshape(-1, 4)
        too_long = dict(meter.report.skipped)
        limits = {"max_prompt_tokens": meter.limits.prompt, "max_completion_tokens": meter.limits.completion}
        cut = {"prompts": meter.report.cut["prompts"], "answers": meter.report.cut["answers"], **limits}
    by_text = {
        name: Lengths(*map(float, np.percentile(counts, [50, 95])), max=int(counts.max()))
        for name, counts in zip(TEXTS, lengths.T, strict=True)
        if len(counts)
    }
    found = {"unit": "tokens" if encoder else "characters", "measured": len(tokenized), "lengths": by_text}
    return {**found, "histograms": _histograms(characters), "cut": cut, "too_long": too_long}


def _histograms(characters: np.ndarray) -> dict[str, dict[str, Histogram]]:
    """Return the lengths of each text, (rows, 4), and the ratios of prompts and answers to their English."""
    lengths = np.maximum(characters, 1)
    ratios = lengths[:, :2] / lengths[:, 2:]

    def by_text(values: np.ndarray) -> dict[str, Histogram]:
        # Beyond the largest, so that a single length has a bin too.
        edges = np.geomspace(values.min(), values.max() * 1.01, _BINS + 1)
        columns = zip(TEXTS, values.T, strict=False)
        counts = {name: np.histogram(column, edges)[0].tolist() for name, column in columns}
        return {name: {"edges": edges.round(3).tolist(), "counts": found} for name, found in counts.items()}

    return {"lengths": by_text(lengths), "ratios": by_text(ratios)}


class _MeasuringEncoder(Encoder):
    """Collects the lengths of every pair's four texts before it is cut."""

    def __init__(self, *settings: Any, fold_system: bool) -> None:
        super().__init__(*settings, fold_system=fold_system)
        self.lengths = array("i")

    def _fit(self, pair: Pair) -> Pair:
        for side in (pair.target, pair.english):
            if side is not None:
                self.lengths.extend((side.answer, side.num_answer_tokens))
        return super()._fit(pair)


class RowCheck:
    """Checks one row after the other, and keeps of each row the traces that the comparison of rows needs.

    That is some tens of bytes a row, and the words of at most `LEXICON_COMPARED` rows spread over the data.
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
        targets, prompts, english = map(first_places, (self._targets, self._prompts, self._english))
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


def first_places(hashes: np.ndarray | array) -> np.ndarray:
    """Return for each row the first place with the same hash, int64 (rows,)."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
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
            found.add("lost_number", index, lambda index=index: lost_number(*side_texts(rows[index])))
    explained |= found.flagged(["lost_number"], len(rows))
    for index in np.flatnonzero(unusual & ~explained).tolist():
        factor = outliers[index]
        found.add("length_ratio", index, f"target {factor:.2g} times as long as usual", abs(math.log(factor)))
    return [Shift(checked.name(part[0]), checked.name(part[-1]), by, len(part)) for part, by in shifts]


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
