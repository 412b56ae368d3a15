"""Rows from a parallel sentence: a text to go on with, or to translate."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product

from pivotune.data.rows import Row
from pivotune.text.languages import Language
from pivotune.text.words import is_unspaced

# A sentence or clause ends here; ASCII marks stand inside numbers and names too.
_CLAUSE_END = re.compile(r"[.!?;:,…،؟؛।։](?=\s)|[。！？；：，、]")
# Share of the text before the cut.
_EARLIEST, _LATEST = 0.25, 0.75
# Difference of these shares between the languages.
_SAME_PLACE = 0.1
_SHORTEST_UNSPACED = 4


def continuation(row: Row, language: Language) -> Row | None:
    """Return the beginning of the sentence as prompt and the rest as answer, in both languages; None for a single word.

    Both sides are cut where a clause ends, if one ends at about the same share of either text; else at the space nearest
    to the middle, in scripts without spaces in the middle.
    """
    target, english = row.completion, row.completion_en
    ends = [[match.end() for match in _CLAUSE_END.finditer(text)] for text in (target, english)]
    fitting = [
        (abs(share - other_share) + abs(share + other_share - 1), one, other)
        for one, other in product(*ends)
        if _EARLIEST <= (share := one / len(target)) <= _LATEST
        and abs(share - (other_share := other / len(english))) <= _SAME_PLACE
    ]
    _, one, other = min(fitting, default=(0, _middle(target), _middle(english)))
    if not (one and other):
        return None
    (prompt, completion), (prompt_en, completion_en) = (
        (text[:cut].strip(), text[cut:].strip()) for text, cut in ((target, one), (english, other))
    )
    return replace(row, prompt=prompt, completion=completion, prompt_en=prompt_en, completion_en=completion_en)


def _middle(text: str) -> int:
    """Return the place to cut near the middle of a stripped text, 0 without one."""
    middle = len(text) // 2
    spaces = [match.start() for match in re.finditer(r"\s", text)]
    if sum(map(is_unspaced, text)) > middle and len(text) >= _SHORTEST_UNSPACED:
        return middle
    return min(spaces, key=lambda place: abs(place - middle), default=0)


def translation(row: Row, language: Language) -> Row:
    """Return the task to translate from English, and on the English side the task to translate into English."""
    task = "Translate the following sentence from {} into {}.\n{}"
    prompts = (
        task.format("English", language.name, row.completion_en),
        task.format(language.name, "English", row.completion),
    )
    return replace(row, prompt=prompts[0], prompt_en=prompts[1])


TASKS: dict[str, Callable[[Row, Language], Row | None]] = {"continue": continuation, "translate": translation}
