from __future__ import annotations

import pytest

from pivotune.data.prepare.tasks import continuation, translation
from pivotune.data.rows import Row
from pivotune.text.languages import find_language

VI = find_language("vi")


def sentences(target: str, english: str) -> Row:
    return Row(target, target, english, english, id="1", number=3)


@pytest.mark.parametrize(
    ("target", "english", "parts"),
    [
        # Behind a clause that ends at the same share of both texts, although one side has a further comma.
        (
            "Khi trời mưa, tôi ở nhà, và đọc.", "When it rains, I stay home and read.",
            ("Khi trời mưa,", "tôi ở nhà, và đọc.", "When it rains,", "I stay home and read."),
        ),
        # 1,000 has a comma that ends no clause.
        ("Nó có 1,000 cái", "It has 1,000 of them", ("Nó có", "1,000 cái", "It has 1,000", "of them")),
        ("我该去睡觉了。", "We should go to sleep.", ("我该去", "睡觉了。", "We should go", "to sleep.")),
    ],
)  # fmt: skip
def test_both_sides_are_cut_at_the_same_place(target, english, parts):
    row = continuation(sentences(target, english), VI)
    assert row is not None
    assert (row.prompt, row.completion, row.prompt_en, row.completion_en) == parts
    assert (row.id, row.number) == ("1", 3)


@pytest.mark.parametrize(("target", "english"), [("Đi.", "Go away."), ("Đi đi.", "Go."), ("好。", "All right.")])
def test_a_single_word_cannot_be_cut(target, english):
    assert continuation(sentences(target, english), VI) is None


def test_translation_asks_for_each_language_from_the_other():
    row = translation(sentences("Xin chào", "Hello"), VI)
    assert row.prompt == "Translate the following sentence from English into Vietnamese.\nHello"
    assert row.prompt_en == "Translate the following sentence from Vietnamese into English.\nXin chào"
    assert (row.completion, row.completion_en) == ("Xin chào", "Hello")
