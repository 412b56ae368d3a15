"""Token F1 and exact match of an answer, normalised per language by the rules of MLQA's or MKQA's official script.

Both scripts lower the text, take out punctuation, then articles, and cut what is left into tokens; F1 compares the two
bags of tokens, exact match the two token sequences, and the best over all gold answers counts. What they do per language:

| language | MLQA (`mlqa_evaluation_v1.py`; XQuAD, MLQA) | MKQA (`mkqa_eval_util.py`; MKQA) |
|---|---|---|
| punctuation of all | every Unicode punctuation mark, and ASCII's symbols | ASCII's only |
| en es vi de | articles as whole words | the same |
| ar | every "ال" ends a token, also inside a word | the same |
| zh | a token per Han character (U+4E00 to U+9FA5), else words | a token per character, also of numbers and Latin words |
| hi | words | not in the set; words |
| da fi hu nl no pt sv | not in the set; articles of MKQA | articles as whole words |
| fr it | not in the set; articles of MKQA | articles also as beginnings of words: "lemon" is left as "mon" |
| ja km th | not in the set; a token per character | a token per character |
| bo dz lo my | in neither: a token per character, as for the other scripts without spaces | the same |
| any other | words, no articles | words, no articles |

Characters are code points, as in the scripts: a Thai vowel sign is one of its own. Nothing is done about Unicode forms.
Where both texts have no tokens left, F1 is 0 by MLQA's rules and 1 by MKQA's, whose empty gold answer means "no answer".

Sources: Lewis et al., "MLQA" (ACL 2020), Longpre et al., "MKQA" (TACL 2021), and the scripts published beside the data.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pivotune.results.metrics import Metric

RuleName = Literal["mlqa", "mkqa"]

QUESTION_ANSWERING_METRICS = (
    Metric("f1", "mean", ("f1",), scale=100.0),
    Metric("exact_match", "mean", ("exact_match",), scale=100.0),
)

_ARTICLES = {
    "en": "a an the",
    "es": "un una unos unas el la los las",
    "vi": "của là cái chiếc những",
    "de": "ein eine einen einem eines einer der die das den dem des",
    "nl": "de het een des der den",
    "sv": "en ett",
    "da": "en et",
    "no": "en et ei",
    "pt": "o a os as um uma uns umas",
    "fi": "se yks yksi",
    "hu": "a az egy",
}
# The order counts, as the first that fits is taken; elided forms ("l'") have lost their apostrophe by then and never fit.
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


class _Removed(dict[int, int | None]):
    """A table for `str.translate` that takes out some characters, asking about each only once."""

    def __init__(self, is_removed: Callable[[str], bool]) -> None:
        super().__init__()
        self._is_removed = is_removed

    def __missing__(self, code: int) -> int | None:
        self[code] = None if self._is_removed(chr(code)) else code
        return self[code]


def _is_ascii_punctuation(character: str) -> bool:
    return character in string.punctuation


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character).startswith("P") or _is_ascii_punctuation(character)


@dataclass(frozen=True, slots=True)
class _Rules:
    """Where the two scripts differ: the table in the module's docstring."""

    punctuation: _Removed
    token_per_character: frozenset[str]
    token_per_han_character: frozenset[str]
    f1_of_two_empty: float


_RULES: dict[RuleName, _Rules] = {
    "mlqa": _Rules(_Removed(_is_punctuation), _SCRIPTS_WITHOUT_SPACES, frozenset({"zh"}), 0.0),
    "mkqa": _Rules(_Removed(_is_ascii_punctuation), _SCRIPTS_WITHOUT_SPACES | {"zh"}, frozenset(), 1.0),
}


def normalize_answer(text: str, language: str, rules: RuleName = "mlqa") -> str:
    """Lower case, no punctuation, no articles, one space between tokens.

    Args:
        text: any text; may be empty.
        language: a code such as `vi`; of one with a region (`zh_cn`, `pt-BR`) the language counts.
        rules: whose, see the module's docstring.
    """
    return " ".join(_tokens(text, language, _RULES[rules]))


def f1_score(prediction: str, references: Sequence[str], language: str, rules: RuleName = "mlqa") -> float:
    """Highest token F1 of the prediction with one of the gold answers, from 0 to 1.

    F1 = 2PR / (P + R), with P the share of the prediction's tokens found in the gold answer and R the share of the gold
    answer's tokens found in the prediction, each token as often as it stands in both.

    Raises:
        ValueError: there are no references.
    """
    rule = _RULES[rules]
    predicted = _tokens(prediction, language, rule)
    return max(_f1(predicted, _tokens(reference, language, rule), rule) for reference in references)


def exact_match(prediction: str, references: Sequence[str], language: str, rules: RuleName = "mlqa") -> float:
    """1 where the prediction is one of the gold answers after normalisation, else 0.

    Raises:
        ValueError: there are no references.
    """
    predicted = normalize_answer(prediction, language, rules)
    return max(float(predicted == normalize_answer(reference, language, rules)) for reference in references)


def _f1(predicted: list[str], gold: list[str], rule: _Rules) -> float:
    if not predicted and not gold:
        return rule.f1_of_two_empty
    # 2PR / (P + R) with P = common / len(predicted) and R = common / len(gold).
    return 2 * (Counter(predicted) & Counter(gold)).total() / (len(predicted) + len(gold))


def _tokens(text: str, language: str, rule: _Rules) -> list[str]:
    base = language.lower().replace("-", "_").partition("_")[0]
    text = text.lower().translate(rule.punctuation)
    if base in _ARTICLE_PATTERNS:
        text = _ARTICLE_PATTERNS[base].sub(" ", text)
    if base in rule.token_per_character:
        return [character for character in text if not character.isspace()]
    if base in rule.token_per_han_character:
        text = _HAN.sub(r" \g<0> ", text)
    return text.split()
