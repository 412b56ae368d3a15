"""What translation keeps of a text: length, numbers, list items, links and code."""

from __future__ import annotations

import re
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pivotune.data.check.text import Text, query_text, query_text_en
from pivotune.data.rows import Row

# Added to both lengths: a word more or less is no outlier in a short text.
RATIO_CHARACTERS = 20
_NUMBER = re.compile(r"\d+(?:[.,\u066b\u066c'\u2019\u00a0\u202f]\d+)*")
# Within a line, and with a longest local part: else a text of millions of line ends, or of one word, takes hours.
_LIST_ITEM = re.compile(r"^[^\S\n]*(?:\d+[.)\u3001\uff0e]|[-*\u2022])[^\S\n]*", re.MULTILINE)
_LINK = re.compile(r"(?:https?://|www\.)[^\s)>\u3002\uff0c]+|[\w.]{1,64}@[\w.]+\w")
_CODE = re.compile(r"```.*?(?:```|$)|`[^`\n]+`|<[^<>\n]{1,200}>", re.DOTALL)
_QUESTION = tuple("?？؟;՞፧")


class SideTrace(NamedTuple):
    """What translation keeps: characters of prompt and answer, numbers, list items, links and code, a question mark."""

    prompt: int
    answer: int
    numbers: frozenset[int]
    items: int
    fixed: frozenset[str]
    question: bool
    is_code: bool


class Trace(NamedTuple):
    """Both sides of a row."""

    target: SideTrace
    english: SideTrace


class TraceTable:
    """Traces of all rows in columns: 37 bytes a row, and 4 for each number, link or code span.

    Attributes:
        signals: uint8 for each row, how many `disagreements` its trace has.
    """

    def __init__(self) -> None:
        # Of each row: prompt and answer of the target side, prompt and answer of the English side.
        self._characters = array("i")
        self._is_code = array("B")
        self.signals = array("B")
        self._target_anchors, self._english_anchors = _Sets(), _Sets()

    def __len__(self) -> int:
        return len(self.signals)

    def append(self, trace: Trace) -> None:
        """Add the trace of the next row."""
        target, english = trace
        self._characters.extend((target.prompt, target.answer, english.prompt, english.answer))
        self._is_code.append(target.is_code or english.is_code)
        self.signals.append(sum(1 for _ in disagreements(trace)))
        self._target_anchors.append(target.numbers | target.fixed)
        self._english_anchors.append(english.numbers | english.fixed)

    def characters(self, rows: slice = slice(None)) -> np.ndarray:
        """Of each row the characters of prompt and answer, target and English: int32 (rows, 2 sides, 2 texts)."""
        return np.frombuffer(self._characters, dtype=np.int32).reshape(-1, 2, 2)[rows]

    def is_code(self, index: int) -> bool:
        """Whether some text of a row is code."""
        return bool(self._is_code[index])

    def anchors(self, rows: range) -> tuple[list[frozenset[int]], list[frozenset[int]]]:
        """Numbers, links and code spans of these rows, as hashes: of the target sides and of the English sides."""
        return [self._target_anchors[row] for row in rows], [self._english_anchors[row] for row in rows]


class _Sets:
    """Sets of texts or numbers as 32-bit hashes."""

    def __init__(self) -> None:
        self._hashes, self._ends = array("I"), array("Q", [0])

    def append(self, items: Iterable[object]) -> None:
        self._hashes.extend(zlib.crc32(str(item).encode()) for item in items)
        self._ends.append(len(self._hashes))

    def __getitem__(self, index: int) -> frozenset[int]:
        return frozenset(self._hashes[self._ends[index] : self._ends[index + 1]])


def disagreements(trace: Trace) -> Iterator[str]:
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


def row_trace(row: Row) -> Trace:
    """What translation keeps of the texts of a row."""
    return Trace(
        side_trace([Text(query_text(row)), Text(row.completion)]),
        side_trace([Text(query_text_en(row)), Text(row.completion_en)]),
    )


def side_trace(texts: Sequence[Text]) -> SideTrace:
    """Trace of one side, from the texts of its prompt and its answer."""
    prompt, answer = (text.text for text in texts)
    whole = f"{prompt}\n{answer}"
    markers = _LIST_ITEM.findall(whole)
    # Numbers of list items agree in any two lists.
    content = _LIST_ITEM.sub("", whole) if markers else whole
    numbers = frozenset(int(re.sub(r"\D", "", number)[:18]) for number in _NUMBER.findall(content))
    fixed = frozenset(_LINK.findall(whole) + _CODE.findall(whole))
    return SideTrace(
        prompt=len(prompt),
        answer=len(answer),
        numbers=numbers,
        items=len(markers),
        fixed=fixed,
        question=prompt.rstrip().endswith(_QUESTION),
        is_code=any(text.is_code() for text in texts),
    )
