"""Words and their counterparts in the other language, from parallel texts (IBM Model 1) or from a dictionary file.

Source: Brown et al. 1993, "The Mathematics of Statistical Machine Translation", section 4.1, without the empty word. With
t(f|e), the probability that the English word e is translated by f, uniform at first, one EM step is

    c(f, e) = sum over texts and their tokens f, e of t(f|e) / sum_e' t(f|e')        (e': English tokens of the same text)
    t(f|e)  = c(f, e) / sum_f' c(f', e)

The same is estimated from target words to English ones. Two words are counterparts if each is the other's likeliest
translation in both directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pivotune.errors import UsageError
from pivotune.text.words import WORD, is_unspaced

_STEPS = 5
# Prompts and words of a prompt that are aligned at most: two words of one row take about 80 bytes while they are counted.
_ROWS, _WORDS = 10_000, 32
# Expected number of times that two words translate each other, and their probability in both directions.
_COUNT, _PROBABILITY = 3.0, 0.3


class Lexicon(NamedTuple):
    """Words in lower case and their counterparts."""

    to_target: Mapping[str, str]
    to_english: Mapping[str, str]


def _lexicon_of(pairs: Sequence[tuple[str, str]]) -> Lexicon:
    """Return the lexicon of pairs of an English and a target word; the first counterpart of a word counts."""
    backwards = pairs[::-1]
    to_target = {english.lower(): target for english, target in backwards}
    return Lexicon(to_target, {target.lower(): english for english, target in backwards})


def read_dictionary(path: Path) -> Lexicon:
    """Read a file of lines `English word, TAB, target word`.

    Raises:
        UsageError: a file that cannot be read, a line of another form, or no line.
    """
    where = f"sdrrl.code_switching.dictionary: {path}"
    pairs: list[tuple[str, str]] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                words = [word.strip() for word in line.split("\t")]
                if len(words) != 2 or not all(words):
                    raise UsageError(
                        f"{where}, line {number}: {line.strip()[:60]!r} found; allowed: English word, TAB, word"
                    )
                pairs.append((words[0], words[1]))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: cannot be read: {getattr(error, 'strerror', error)}") from error
    if not pairs:
        raise UsageError(f"{where}: holds no line; allowed: lines of English word, TAB, word")
    return _lexicon_of(pairs)


def align_words(rows: Sequence[Any], chosen: np.ndarray | None = None) -> Lexicon:
    """Learn the lexicon of `prompt_en` and `prompt` of the rows, or of the rows at the `chosen` places, int (rows,).

    Above 10,000 rows, as many spread over the data are read, and of each prompt the first 32 words.

    Raises:
        UsageError: most target words are in a script without spaces, or no two words are counterparts.
    """
    english_ids: dict[str, int] = {}
    target_ids: dict[str, int] = {}
    # For each pair of words in the same row: their numbers, and the places of both tokens in the data.
    found: list[np.ndarray] = []
    places = np.zeros((2, 1), dtype=np.int32)
    chosen = np.arange(len(rows)) if chosen is None else chosen
    for place in chosen[:: math.ceil(len(chosen) / _ROWS)]:
        row = rows[int(place)]
        english, target = (
            np.array([ids.setdefault(word, len(ids)) for word in WORD.findall(text.lower())[:_WORDS]], dtype=np.int32)
            for ids, text in ((english_ids, row.prompt_en), (target_ids, row.prompt))
        )
        both = np.indices((len(english), len(target)), dtype=np.int32).reshape(2, -1)
        found.append(np.concatenate([[english[both[0]], target[both[1]]], both + places]))
        places += np.array([[len(english)], [len(target)]], dtype=np.int32)
    words, words_en = list(target_ids), list(english_ids)
    advice = "set sdrrl.code_switching.dictionary to a file, or sdrrl.code_switching.share to 0"
    if sum(map(is_unspaced, words)) > len(words) / 2:
        raise UsageError(f"sdrrl.code_switching: words of a script without spaces cannot be aligned; {advice}")
    english, target, english_token, target_token = np.concatenate(found, axis=1)
    keys, pair = np.unique(english.astype(np.int64) * len(words) + target, return_inverse=True)
    of_english, of_target = np.divmod(keys, max(len(words), 1))
    forward, count = _translation_probabilities(pair, target_token, of_english)
    backward, _ = _translation_probabilities(pair, english_token, of_target)
    sure = (count >= _COUNT) & (np.minimum(forward, backward) >= _PROBABILITY)
    for probability, given in ((forward, of_english), (backward, of_target)):
        best = np.zeros(given.max(initial=0) + 1)
        np.maximum.at(best, given, probability)
        sure &= probability == best[given]
    pairs = [(words_en[of_english[place]], words[of_target[place]]) for place in np.flatnonzero(sure)]
    lexicon = _lexicon_of([pair for pair in pairs if pair[0] != pair[1]])
    if not lexicon.to_target:
        raise UsageError(f"sdrrl.code_switching: the prompts of {len(chosen)} rows give no pair of words; {advice}")
    return lexicon


def _translation_probabilities(pair: np.ndarray, token: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return t(word | given word) and the expected count of each different pair of words, float64 (pairs,).

    Args:
        pair: for each pair of tokens in the same row, the number of its pair of words.
        token: the number of the token that is translated.
        given: the number of the word that is translated into it, (pairs,).
    """
    probability = counts = np.ones(len(given))
    for _ in range(_STEPS):
        weights = probability[pair]
        counts = np.bincount(pair, weights / np.bincount(token, weights)[token])
        probability = counts / np.bincount(given, counts)[given]
    return probability, counts
