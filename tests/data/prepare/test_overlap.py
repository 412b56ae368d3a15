from __future__ import annotations

import re

from pivotune.data.prepare.overlap import find_overlap
from pivotune.data.rows import Row

PASSAGE = re.findall(r"\w+", "the quick brown fox jumps over the lazy dog and then it goes home to sleep")
CHINESE = "埃胡德乌尔博士新斯科舍省哈利法克斯市达尔豪西大学医学教授"


def row(prompt: str, completion: str = "yes", prompt_en: str = "", completion_en: str = "") -> Row:
    return Row(prompt, completion, prompt_en, completion_en)


def test_thirteen_words_in_a_row_overlap_and_twelve_do_not():
    rows = [
        row("We know: " + " ".join(PASSAGE[1:14]).upper() + ", or not."),
        row("We know: " + " ".join(PASSAGE[1:13]) + ", or not."),
        row("no", prompt_en="x " + " ".join(PASSAGE[:13])),
        row(" ".join(PASSAGE[:7]), " ".join(PASSAGE[7:])),  # prompt and answer are two texts
    ]
    found = find_overlap(rows, {"a": [["nothing of it", " ".join(PASSAGE)]], "b": [["short"]]})
    assert (found["a"].rows, found["a"].found, found["a"].compared) == ([0, 2], {0}, 1)
    assert (found["b"].rows, found["b"].items, found["b"].compared) == ([], 1, 0)
    assert found["a"].to_dict([Row("", "", "", "", number=7 * place) for place in range(4)]) == {
        "items": 1, "compared": 1, "overlapping": 1, "rows": [0, 14],
    }  # fmt: skip


def test_short_texts_must_occur_whole_and_have_eight_words():
    eight, seven = "who was it that wrote the old book?", "who was it that wrote the book?"
    found = find_overlap([row(f"Tell me, {eight}"), row(f"Tell me, {seven}")], {"a": [[eight], [seven]]})
    assert (found["a"].rows, found["a"].found, found["a"].compared) == ([0], {0}, 1)


def test_characters_count_where_words_are_not_spaced():
    rows = [row(f"在{CHINESE[3:23]}，他说"), row(f"在{CHINESE[3:22]}，他说"), row("请问 " + CHINESE[:12])]
    found = find_overlap(rows, {"a": [[CHINESE], [CHINESE[:12]], [CHINESE[12:23]]]})
    assert (found["a"].rows, found["a"].found, found["a"].compared) == ([0, 2], {0, 1}, 2)


def test_items_that_share_a_text_are_all_found():
    passage = " ".join(PASSAGE)
    found = find_overlap([row(passage)], {"vi": [[passage, "q one"], [passage, "q two"]], "en": [[passage]]})
    assert (found["vi"].found, found["en"].found, found["vi"].rows) == ({0, 1}, {0}, [0])
