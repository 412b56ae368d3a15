"""What translation keeps of a text: length, numbers, list items, links and code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from pivotune.data.check.text import Text

# Added to both lengths: a word more or less is no outlier in a short text.
RATIO_CHARACTERS = 20
_NUMBER = re.compile(r"\d+(?:[.,\u066b\u066c'\u2019\u00a0\u202f]\d+)*")
_LIST_ITEM = re.compile(r"^\s*(?:\d+[.)\u3001\uff0e]|[-*\u2022])\s*", re.MULTILINE)
_LINK = re.compile(r"(?:https?://|www\.)[^\s)>\u3002\uff0c]+|[\w.]+@[\w.]+\w")
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
