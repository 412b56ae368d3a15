"""Words of a text in any script, and the noun of a count."""

from __future__ import annotations

import re

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
# Letters with their combining marks, which `\w` leaves out, and without digits and punctuation.
_SPACED = (
    "A-Za-zªµºÀ-ÖØ-öø-\u02ff\u0300-\u037d\u037f-\u0386\u0388-\u0589\u0591-\u05f2\u0610-\u061a\u0620-\u065f\u066e-\u06d3"
    "\u06d5-\u06ef\u06fa-\u06ff\u0710-\u07bf\u0900-\u0963\u0971-\u0dff\u0f00-\u0fff\u10a0-\u135f\u1380-\u177f"
    "\u1800-\u1fff\u2c00-\u2dff\ua4d0-\uabff\uac00-\ud7a3\ufb00-\ufd3d\ufd50-\ufdfb\ufe70-\ufefc"
)
# A word, or a run of a script that writes no spaces between words.
WORD = re.compile(f"[{_UNSPACED}]+|[{_SPACED}]+")


def is_unspaced(word: str) -> bool:
    """Return True for a match of `WORD` in a script that writes no spaces between words."""
    return word[0] >= "\u0e00" and re.match(f"[{_UNSPACED}]", word) is not None


def counted(number: int, noun: str = "row") -> str:
    """Return `1 row` or `1,200 rows`."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"
