"""Texts and their words in any script: what the checks of one row and of pairs look at."""

from __future__ import annotations

import re

from pivotune.data.rows import Row
from pivotune.data.templates import Turn

# Code is no language: this share of symbols among all that is not white space.
CODE_SYMBOLS, CODE_SHARE = frozenset("{}[]()<>=;_\\|+*/#$&@"), 0.08
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
# Letters with their combining marks, which `\w` leaves out, and without digits and punctuation.
_SPACED = (
    "A-Za-zªµºÀ-ÖØ-öø-\u02ff\u0300-\u037d\u037f-\u0386\u0388-\u0589\u0591-\u05f2\u0610-\u061a\u0620-\u065f\u066e-\u06d3"
    "\u06d5-\u06ef\u06fa-\u06ff\u0710-\u07bf\u0900-\u0963\u0971-\u0dff\u0f00-\u0fff\u10a0-\u135f\u1380-\u177f"
    "\u1800-\u1fff\u2c00-\u2dff\ua4d0-\uabff\uac00-\ud7a3\ufb00-\ufd3d\ufd50-\ufdfb\ufe70-\ufefc"
)
_WORD = re.compile(f"[{_UNSPACED}]+|[{_SPACED}]+")
# A copied sentence has kept one of these; a translated list of names has not.
ENGLISH_WORDS = frozenset(
    re.findall(
        r"\w+",
        "the an of and or to in into is are was were be been for on with that this it as by at from what which how who why"
        " when where do does you your my we he she his her they their not can will have has had write find give create make"
        " translate sentence following english",
    )
)


class Text:
    """A text and its words in lower case; runs of a script without spaces are one word each."""

    __slots__ = ("text", "words")

    def __init__(self, text: str) -> None:
        self.text = text
        self.words: list[str] = _WORD.findall(text.lower())

    def terms(self) -> set[str]:
        """Words, and pairs of neighbouring characters where words are not spaced."""
        words = set(self.words)
        runs = [word for word in words if len(word) > 2 and is_unspaced(word)]
        return words.difference(runs).union(*({run[i : i + 2] for i in range(len(run) - 1)} for run in runs))

    def is_code(self) -> bool:
        """Whether symbols of programs are a large share of the text, or it has a fenced block."""
        symbols = sum(map(self.text.count, CODE_SYMBOLS))
        return symbols >= CODE_SHARE * len(self.text) or "```" in self.text


def is_unspaced(word: str) -> bool:
    """Whether a word of `Text.words` is of a script that writes no spaces between words."""
    return word[0] >= "\u0e00" and re.match(f"[{_UNSPACED}]", word) is not None


def query_text(row: Row) -> str:
    """What the user says in the target language, as training will see it: prompt and input."""
    return Turn(row.prompt, input=row.input).user_text


def query_text_en(row: Row) -> str:
    """The same for the English side."""
    return Turn(row.prompt_en, input=row.input_en).user_text
