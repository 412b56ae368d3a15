"""SDRRL (our reading): self-distillation from the model's own English answers, trained with L_TFT alone.

Source: Zhang et al., ACL 2024, "Enhancing Multilingual Capabilities of Large Language Models through Self-Distillation from
Resource-Rich Languages". `pivotune data self-answers` makes the answers; docs/method.md lists what is our choice.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pivotune.errors import UsageError
from pivotune.methods.base import Method, check_named
from pivotune.methods.cross_lingual import draw_kinds, english_answer, english_prompt, from_english, into_english
from pivotune.methods.word_alignment import Lexicon, align_words, read_dictionary
from pivotune.text.languages import find_language
from pivotune.text.words import WORD, is_unspaced

# Whether question and answer are English, in the order of the settings' weights.
_COMBINATIONS = ((False, False), (False, True), (True, False), (True, True))


@dataclass(frozen=True, kw_only=True)
class Sdrrl(Method):
    """Rows of six kinds (`sdrrl` in the settings); the number of rows stays the same."""

    def rewriter(self, rows: Sequence[Any], settings: Any) -> Callable[[int, Any], Any]:
        """Draw the rows of each kind, those with code switching and their words by the seed and the number of rows.

        Raises:
            UsageError: no target language, whose name prompts need, or words without counterparts.
        """
        own, codes = settings.sdrrl, settings.data.languages
        switching = own.code_switching
        named_by = {"translation": own.translation, "name_language": own.name_language and own.english_target}
        if key := next(filter(named_by.get, named_by), None):
            check_named(codes, f"sdrrl.{key}: prompts")
        generator = np.random.default_rng(settings.seed)
        *combined, half, completed = own.shares
        kind_of = draw_kinds([*combined, half / 2, half / 2, completed], len(rows), generator)
        tasks = (into_english, partial(from_english, *codes[:1]), complete_answer)
        switched = draw_kinds([switching.share], len(rows), generator) == 0
        switched &= kind_of < len(_COMBINATIONS)
        # By the row's language, and by whether its prompt is English.
        switchers: dict[tuple[str, bool], WordSwitcher] = {}
        for code, lexicon in (_lexicons(rows, codes, switching.dictionary) if switched.any() else {}).items():
            for english, words in enumerate((lexicon.to_english, lexicon.to_target)):
                switchers[code, bool(english)] = WordSwitcher(words, switching.probability)

        def rewrite(place: int, row: Any) -> Any:
            kind = int(kind_of[place])
            if kind >= len(_COMBINATIONS):
                return tasks[kind - len(_COMBINATIONS)](row)
            prompt_is_english, answer_is_english = _COMBINATIONS[kind]
            row = english_prompt(row) if prompt_is_english else row
            row = english_answer(row) if answer_is_english else row
            if switched[place]:
                switcher, words = (
                    switchers[row.language, prompt_is_english],
                    np.random.default_rng([settings.seed, place]),
                )
                row = replace(row, prompt=switcher.switch(row.prompt, words), input=switcher.switch(row.input, words))
            if own.name_language and prompt_is_english != answer_is_english:
                name = "English" if answer_is_english else find_language(row.language or codes[0]).name
                row = replace(row, prompt=f"{row.prompt}\n\nAnswer in {name}.")
            return row

        return rewrite


def _lexicons(rows: Sequence[Any], codes: Sequence[str], dictionary: str | None) -> dict[str, Lexicon]:
    """Return the words and their counterparts in each language of the rows (`Row.language`)."""
    if dictionary is not None:
        if len(codes) > 1:
            raise UsageError(
                f"sdrrl.code_switching.dictionary: it has one language, and the rows have {', '.join(codes)}; leave it out"
            )
        return {"": read_dictionary(Path(dictionary).expanduser())}
    languages = np.array([row.language for row in rows] if len(codes) > 1 else [""] * len(rows))
    return {code: align_words(rows, np.flatnonzero(languages == code)) for code in np.unique(languages).tolist()}


class WordSwitcher:
    """Replaces each word that has a counterpart by it with a probability; a capital at the beginning stays one.

    In scripts without spaces the longest known words are found from left to right, and counterparts get spaces around them.
    """

    def __init__(self, counterparts: Mapping[str, str], probability: float) -> None:
        self._counterparts, self._probability = counterparts, probability
        self._longest = max(map(len, counterparts))

    def switch(self, text: str, generator: np.random.Generator) -> str:
        """Return the text with some words replaced."""

        def replacement(match: re.Match[str]) -> str:
            words = self._known_words(match[0]) if is_unspaced(match[0]) else [match[0]]
            switched = [self._counterpart(word, generator) for word in words]
            if len(words) == 1:
                return switched[0]
            both = zip(words, switched, strict=True)
            return " ".join("".join(old if old == new else f" {new} " for old, new in both).split())

        return WORD.sub(replacement, text)

    def _counterpart(self, word: str, generator: np.random.Generator) -> str:
        counterpart = self._counterparts.get(word.lower())
        if counterpart is None or generator.random() >= self._probability:
            return word
        return counterpart[0].upper() + counterpart[1:] if word[0].isupper() else counterpart

    def _known_words(self, run: str) -> list[str]:
        pieces, start = [], 0
        while start < len(run):
            ends = range(min(len(run), start + self._longest), start, -1)
            end = next((end for end in ends if run[start:end] in self._counterparts), start + 1)
            pieces.append(run[start:end])
            start = end
        return pieces


def complete_answer(row: Any) -> Any:
    """Return the task to complete the target answer from its first half, cut between words (characters without spaces).

    An answer of one word is trained after its question.
    """
    text = row.completion.strip()
    # A mark belongs to the letter before it.
    letters = [place for place in range(1, len(text)) if unicodedata.category(text[place])[0] != "M"]
    cuts = [place for place in letters if text[place].isspace() or is_unspaced(text[place])]
    if not cuts:
        return row
    cut = min(cuts, key=lambda place: abs(place - len(text) / 2))
    prompt = f"Complete the following text:\n\n{text[:cut].rstrip()}"
    return replace(row, prompt=prompt, input="", history=(), completion=text[cut:].lstrip())


SDRRL = Sdrrl(
    name="sdrrl",
    summary="SDRRL (our reading): fine-tuning on the model's own English answers and their translations, with question and "
    "answer in every combination of the languages, code switching, translation and completion (`sdrrl` below).",
    main_language="target",
    replay=False,
    needs_english=True,
)
