"""XStoryCloze in the publisher's table, in the Hub's copy of it, and from the Hub."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from benchmark_files import read_task

from pivotune.errors import UsageError
from pivotune.evaluation.tasks import tables
from pivotune.evaluation.tasks.understanding import XSTORYCLOZE

pytest.importorskip("lm_eval", reason="lm-evaluation-harness (extra eval) is not installed")

HEADER = (
    "InputStoryid\tInputSentence1\tInputSentence2\tInputSentence3\tInputSentence4\tRandomFifthSentenceQuiz1\t"
    "RandomFifthSentenceQuiz2\tAnswerRightEnding\n"
)
HUB_HEADER = (
    "story_id\tinput_sentence_1\tinput_sentence_2\tinput_sentence_3\tinput_sentence_4\tsentence_quiz1\t"
    "sentence_quiz2\tanswer_right_ending\n"
)
ROWS = (
    'a-1\tЭто раз.\tДва.\tТри.\tЧетыре.\tПять.\tШесть.\t1\nb-2\t"Да", сказал он.\tДва.\tТри.\tЧетыре.\tПять.\tВсё.\t2\n'
)


read = partial(read_task, XSTORYCLOZE)


def write(folder: Path, text: str | bytes, language: str = "ru") -> Path:
    path = folder / f"XStoryCloze/spring2016.val.{language}.tsv.split_20_80_eval.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("header", [HEADER, HUB_HEADER, HEADER.replace("\n", "\r\n")])
def test_both_spellings_of_the_header(header, tmp_path):
    path = write(tmp_path, header + ROWS)
    data = read("ru", tmp_path)
    assert (data.split, list(data.origin)) == ("eval", [f"XStoryCloze/{path.name}"])
    assert [(item.id, item.gold) for item in data.items] == [("a-1", 0), ("b-2", 1)]
    assert data.items[0].query == "Это раз. Два. Три. Четыре."
    assert data.items[1].query == '"Да", сказал он. Два. Три. Четыре.'
    assert data.items[0].choices == ("Пять.", "Шесть.")


def test_quoted_cells(tmp_path):
    write(tmp_path, HEADER + 'a\t"""Да"" и всё."\t"Два."\tТри.\tЧетыре.\tПять.\tШесть.\t"2"\n')
    (item,) = read("ru", tmp_path).items
    assert (item.query, item.gold) == ('"Да" и всё. Два. Три. Четыре.', 1)


def test_hub_rows(monkeypatch):
    asked = []

    def rows(*place):
        asked.append(place)
        names = HUB_HEADER.split()
        yield 1, dict(zip(names, ["a", "1.", "2.", "3.", "4.", "5.", "6.", 2], strict=True))

    monkeypatch.setattr(tables, "read_hub_records", rows)
    (item,) = read("ar", None).items
    assert asked == [("xstorycloze_ar", "juletxara/xstory_cloze", "ar", "eval")]
    assert (item.id, item.query, item.choices, item.gold) == ("a", "1. 2. 3. 4.", ("5.", "6."), 1)


def test_missing_set_and_split(tmp_path):
    with pytest.raises(
        UsageError, match=r"xstorycloze_ar: no spring2016\.val\.ar\.tsv.* get it from https://huggingface"
    ):
        read("ar", tmp_path)
    with pytest.raises(UsageError, match="xstorycloze_ar: has no split 'train'; allowed: eval"):
        read("ar", tmp_path, "train")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (HEADER + ROWS + "c\tа.\tб.\n", "line 4: 3 columns; expected 8 (InputStoryid, InputSentence1"),
        (HEADER + ROWS + "c\tа.\tб.\tв.\tг.\tд.\te.\t3\n", "line 4: answer_right_ending is '3'; allowed: 1, 2"),
        (HEADER + ROWS + 'c\tа.\tб.\tв.\tг.\t""\te.\t1\n', "line 4: 'sentence_quiz1' is empty"),
        (HEADER + ROWS + "a-1\tа.\tб.\tв.\tг.\tд.\te.\t1\n", "line 4: the id 'a-1' is that of"),
        (
            HEADER.replace("AnswerRightEnding", "Answer") + ROWS,
            "line 1: no 'AnswerRightEnding' or 'answer_right_ending'",
        ),
        (ROWS, "line 1: no 'InputStoryid' or 'story_id'"),
        ((HEADER + ROWS).encode("cp1251"), "line 2: not UTF-8"),
    ],
)
def test_malformed_files(text, problem, tmp_path):
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read("ru", tmp_path)
    assert str(caught.value).startswith(f"{path}, {problem}")
