from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest

from pivotune.data.prepare.near_duplicates import (
    near_duplicates,
    shingle_length,
    shingles,
    similarity,
)
from pivotune.data.rows import Row
from pivotune.text.languages import find_language


def naive_shingles(text: str) -> set[str]:
    plain = re.sub(r"\s+", " ", text.lower())
    return {plain[place : place + 5] for place in range(len(plain) - 4)}


def naive_similarity(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """120 random texts; every third follows as a copy with up to 30 words replaced."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=6)) for _ in range(2000)]
    found = []
    for number in range(120):
        text = draw.choices(words, k=60)
        found.append(" ".join(text))
        if number % 3 == 0:
            for place in draw.sample(range(60), k=draw.randint(0, 30)):
                text[place] = draw.choice(words)
            found.append(" ".join(text))
    return found


def test_shingles_have_the_similarity_of_the_definition(texts):
    for one, other in pairwise(texts[:20]):
        expected = naive_similarity(naive_shingles(one), naive_shingles(other))
        assert similarity(shingles(one, 5), shingles(other, 5)) == pytest.approx(expected)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_the_first_kept_row_is_found_as_by_comparing_all(texts, threshold):
    rows = [Row(text, "x", "", "") for text in texts]
    sets = [naive_shingles(f"{text}\nx") for text in texts]
    expected: dict[int, int] = {}
    for place, own in enumerate(sets):
        kept = (other for other in range(place) if other not in expected)
        same = (other for other in kept if naive_similarity(own, sets[other]) >= threshold)
        if (first := next(same, None)) is not None:
            expected[place] = first
    assert near_duplicates(rows, range(len(rows)), threshold, 5) == expected
    # The copies are spread over the threshold: some are found, others are not.
    assert 0 < len(expected) < 40


def test_case_white_space_and_width_do_not_count_and_short_texts_are_compared_whole():
    rows = [Row(text, "y", "", "") for text in ("Hello  World", "hello world", "ｈｅｌｌｏ world", "a", "b", "A")]
    assert near_duplicates(rows, range(6), 0.8, 5) == {1: 0, 2: 0, 5: 3}
    assert near_duplicates(rows, [1, 2, 4, 5], 0.8, 5) == {2: 1}


def test_shingles_are_shorter_where_words_are_not_spaced():
    assert [shingle_length(find_language(code)) for code in ("vi", "zh", "th", "ko")] == [5, 3, 3, 5]
