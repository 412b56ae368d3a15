"""Traces of a text that translation keeps (length, numbers, list items, links, code), and slipped stretches of rows."""

from __future__ import annotations

import math
import re
import zlib
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pivotune.data.check.language import Text

# Added to both lengths: a word more or less is no outlier in a short text.
RATIO_CHARACTERS = 20
NUMBER = re.compile(r"\d+(?:[.,\u066b\u066c'\u2019\u00a0\u202f]\d+)*")
# Bounded to a line and to a local part: else a text of millions of line ends, or of one word, takes hours.
_LIST_ITEM = re.compile(r"^[^\S\n]*(?:\d+[.)\u3001\uff0e]|[-*\u2022])[^\S\n]*", re.MULTILINE)
_LINK = re.compile(r"(?:https?://|www\.)[^\s)>\u3002\uff0c]+|[\w.]{1,64}@[\w.]+\w")
_CODE = re.compile(r"```.*?(?:```|$)|`[^`\n]+`|<[^<>\n]{1,200}>", re.DOTALL)
_QUESTION = tuple("?？؟;՞፧")
# An English side that has slipped further than this is found as misaligned rows only.
SHIFTS = (-2, -1, 0, 1, 2)
# Evidence in nats to believe that a shift begins or ends at a row: one in a million for each row of a long file.
SHIFT_SWITCH = 14.0
# Largest evidence of one row, so that a few odd rows cannot prove a shift.
SHIFT_ROW_LIMIT = 3.0
# Rows compared together; they need some hundred bytes each meanwhile.
SHIFT_ROWS = 100_000


class SideTrace(NamedTuple):
    """Traces of one side: characters of prompt and answer, numbers, list items, links and code, a question mark."""

    prompt: int
    answer: int
    numbers: frozenset[int]
    items: int
    fixed: frozenset[str]
    question: bool
    is_code: bool


class TraceTable:
    """Traces of all rows in columns: 34 bytes a row, and 4 for each number, link or code span.

    Attributes:
        signals: uint8 for each row, the number of `disagreements` of its sides.
        is_code: uint8 for each row, 1 if some text of the row is code.
    """

    def __init__(self) -> None:
        # Of each row: prompt and answer of the target side, prompt and answer of the English side.
        self._characters = array("i")
        self.is_code, self.signals = array("B"), array("B")
        # Numbers, links and code spans as 32-bit hashes; of each row where those of the target and of the English side end.
        self._anchors, self._ends = array("I"), array("Q", [0])

    def __len__(self) -> int:
        return len(self.signals)

    def append(self, target: SideTrace, english: SideTrace) -> None:
        """Add the traces of the next row."""
        self.is_code.append(target.is_code or english.is_code)
        self.signals.append(sum(1 for _ in disagreements(target, english)))
        for side in (target, english):
            self._characters.extend((side.prompt, side.answer))
            self._anchors.extend(zlib.crc32(str(item).encode()) for item in side.numbers | side.fixed)
            self._ends.append(len(self._anchors))

    def characters(self, rows: slice = slice(None)) -> np.ndarray:
        """Return the characters of prompt and answer on both sides: int32 (rows, 2 sides, 2 texts)."""
        return np.frombuffer(self._characters, dtype=np.int32).reshape(-1, 2, 2)[rows]

    def anchors(self, rows: range, side: int) -> list[frozenset[int]]:
        """Return the hashes of numbers, links and code spans of these rows; `side` is 1 for the English one."""
        places = (2 * row + side for row in rows)
        return [frozenset(self._anchors[self._ends[place] : self._ends[place + 1]]) for place in places]


def disagreements(target: SideTrace, english: SideTrace) -> Iterator[str]:
    """Yield the signals that two sides are no translation of each other; each alone is common in good rows."""
    if target.numbers and english.numbers and target.numbers.isdisjoint(english.numbers):
        few, many = (", ".join(map(str, sorted(side.numbers)[:3])) for side in (target, english))
        yield f"numbers {few} against {many}"
    if target.fixed and english.fixed and target.fixed.isdisjoint(english.fixed):
        yield "other links or code"
    few, many = sorted((target.items, english.items))
    if few == 0 and many >= 3:
        yield f"{target.items} list items against {english.items}"
    if target.question != english.question:
        yield "question against statement"


def side_trace(texts: Sequence[Text]) -> SideTrace:
    """Return the traces of one side, from the texts of its prompt and its answer."""
    prompt, answer = (text.text for text in texts)
    whole = f"{prompt}\n{answer}"
    # Numbers of list items agree in any two lists.
    content, items = _LIST_ITEM.subn("", whole)
    return SideTrace(
        prompt=len(prompt),
        answer=len(answer),
        numbers=frozenset(int(re.sub(r"\D", "", number)[:18]) for number in NUMBER.findall(content)),
        items=items,
        fixed=frozenset(_LINK.findall(whole) + _CODE.findall(whole)),
        question=prompt.rstrip().endswith(_QUESTION),
        is_code=any(text.is_code() for text in texts),
    )


def find_shifts(traces: TraceTable) -> list[tuple[range, int]]:
    """Return stretches of rows whose English stands some rows further down, by lengths and shared numbers, links and code.

    Each row gives for each shift the log-likelihood ratio of a true pair against unrelated texts. The most likely course of
    shifts is found by dynamic programming (Viterbi), where each change costs `SHIFT_SWITCH`. Long files are cut into equal
    parts of at most `SHIFT_ROWS` rows, and stretches that meet at a cut are joined.
    """
    bounds = np.linspace(0, len(traces), math.ceil(len(traces) / SHIFT_ROWS) + 1).astype(int).tolist()
    courses = [_course(traces, range(first, stop)) for first, stop in pairwise(bounds)]
    course = np.concatenate([np.zeros(0, dtype=np.int8), *courses])
    borders = [0, *(np.flatnonzero(np.diff(course)) + 1).tolist(), len(course)]
    return [(range(first, stop), int(course[first])) for first, stop in pairwise(borders) if course[first]]


def _course(traces: TraceTable, rows: range) -> np.ndarray:
    """Return the likeliest shift of each row, int8 (rows,)."""
    if len(rows) < 2 * max(SHIFTS) + 2:
        return np.zeros(len(rows), dtype=np.int8)
    logarithms = np.log(traces.characters(slice(rows.start, rows.stop)) + RATIO_CHARACTERS)
    evidence = sum(_length_evidence(logarithms[:, 0, part], logarithms[:, 1, part]) for part in range(2))
    evidence = evidence + _anchor_evidence(traces.anchors(rows, 0), traces.anchors(rows, 1))
    # The most likely path, which starts unshifted.
    total = np.full(len(SHIFTS), -SHIFT_SWITCH)
    total[SHIFTS.index(0)] = 0.0
    came_from = np.zeros(evidence.shape, dtype=np.int8)
    for index, gain in enumerate(np.clip(evidence, -SHIFT_ROW_LIMIT, SHIFT_ROW_LIMIT)):
        best = int(total.argmax())
        # On a tie the later switch: the row before a slip fits both courses.
        switch = total[best] - SHIFT_SWITCH >= total - 1e-9
        came_from[index] = np.where(switch, best, np.arange(len(SHIFTS)))
        total = np.where(switch, total[best] - SHIFT_SWITCH, total) + gain
    state = int(total.argmax())
    course = np.zeros(len(rows), dtype=np.int8)
    for index in range(len(rows) - 1, -1, -1):
        course[index] = SHIFTS[state]
        state = int(came_from[index, state])
    return course


def _length_evidence(target: np.ndarray, english: np.ndarray) -> np.ndarray:
    """Return the log-likelihood ratio of pairs against unrelated texts, with Laplace distributions of the log ratio.

    Shape (rows, shifts).
    """
    usual = np.median(target) - np.median(english)
    distances = np.stack([np.abs(target - np.roll(english, -by) - usual) for by in SHIFTS], axis=1)
    strangers = np.abs(target - np.roll(english, len(english) // 2) - usual)
    # The closest quarter belongs to true pairs even where most of the file has slipped.
    scale = max(float(np.quantile(distances, 0.25, axis=0).min()) / math.log(4 / 3), 0.02)
    scale_strangers = max(float(np.median(strangers)) / math.log(2), scale)
    return distances / scale_strangers - distances / scale + math.log(scale_strangers / scale)


def _anchor_evidence(target: Sequence[frozenset], english: Sequence[frozenset]) -> np.ndarray:
    """Return the log-likelihood ratio of a shared number, link or code span, where both sides have any."""
    count = len(target)

    def shares(index: int, by: int) -> int:
        """Return 1 if a row shares an anchor with the English `by` rows further, 0 if not, -1 if one has none."""
        one, other = target[index], english[(index + by) % count]
        return int(not one.isdisjoint(other)) if one and other else -1

    shared = np.array([[shares(index, by) for by in (*SHIFTS, count // 2)] for index in range(count)])
    known = shared >= 0
    rates = ((shared == 1).sum(axis=0) + 1) / (known.sum(axis=0) + 2)
    pair, stranger = float(rates[:-1].max()), float(rates[-1])
    agree, differ = math.log(pair / stranger), math.log((1 - pair) / (1 - stranger))
    evidence = np.where(shared == 1, agree, differ) * known
    return evidence[:, :-1] if agree > 0 else np.zeros((count, len(SHIFTS)))
