from __future__ import annotations

import random
import re
from itertools import pairwise

import numpy as np
import pytest

from pivotune.data.prepare.near_duplicates import (
    connected_groups,
    equal_pairs,
    near_duplicates,
    shingle_length,
    shingles,
    similarity,
)
from pivotune.data.rows import Row
from pivotune.text.languages import find_language


def naive_similarity(one: str, other: str, length: int) -> float:
    sets = []
    for text in (one, other):
        plain = re.sub(r"\s+", " ", text.lower())
        sets.append({plain[place : place + length] for place in range(len(plain) - length + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """300 random texts; every third follows as a copy with up to 30 words replaced."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=6)) for _ in range(2000)]
    found = []
    for number in range(300):
        text = draw.choices(words, k=60)
        found.append(" ".join(text))
        if number % 3 == 0:
            for place in draw.sample(range(60), k=draw.randint(0, 30)):
                text[place] = draw.choice(words)
            found.append(" ".join(text))
    return found


def test_shingles_have_the_similarity_of_the_definition(texts):
    for one, other in pairwise(texts[:20]):
        expected = naive_similarity(one, other, 5)
        assert similarity(shingles(one, 5), shingles(other, 5)) == pytest.approx(expected)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_groups_are_those_of_all_pairs_compared(texts, threshold):
    rows = [Row(text, "x", "", "") for text in texts]
    sets = [shingles(f"{text}\nx", 5) for text in texts]
    expected = [
        (one, other)
        for other in range(len(rows))
        for one in range(other)
        if similarity(sets[one], sets[other]) >= threshold
    ]
    found = near_duplicates(rows, threshold, 5)
    assert {tuple(pair) for pair in found.tolist()} == set(expected)
    # The copies are spread over the threshold: some are found, others are not.
    assert 0 < len(expected) < 100
    groups = connected_groups(len(rows), [found])
    assert len(np.unique(groups)) == len(rows) - len(expected)


def test_case_white_space_and_width_do_not_count_and_short_texts_are_compared_whole():
    rows = [Row(text, "y", "", "") for text in ("Hello  World", "hello world", "ｈｅｌｌｏ world", "a", "b", "A")]
    found = {tuple(pair) for pair in near_duplicates(rows, 0.8, 5).tolist()}
    assert found == {(0, 1), (1, 2), (0, 2), (3, 5)}


def test_groups_of_equal_keys():
    groups = connected_groups(5, [equal_pairs(np.array(["a", "b", "a", "c", "b"])), np.array([[0, 3]])])
    assert [groups[place] == groups[0] for place in range(5)] == [True, False, True, True, False]
    assert groups[1] == groups[4]


def test_shingles_are_shorter_where_words_are_not_spaced():
    assert [shingle_length(find_language(code)) for code in ("vi", "zh", "th", "ko")] == [5, 3, 3, 5]
