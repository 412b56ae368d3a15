"""XNLI, XCOPA and XStoryCloze: real files, layouts of publishers, splits, the Hub, malformed files."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import read_task, write_file

from pivotune.errors import UsageError
from pivotune.evaluation.tasks import tables
from pivotune.evaluation.tasks.understanding import XCOPA, XNLI, XSTORYCLOZE

pytest.importorskip("lm_eval", reason="lm-evaluation-harness (extra eval) is not installed")

XNLI_ROWS = (
    'Es regnet.\tEs ist nass.\tentailment\nEs regnet.\tEr sagte "nein\tneutral\nEs regnet.\tTrocken.\tcontradictory\n'
)
OFFICIAL = "language\tgold_label\tsentence1_parse\tsentence1\tsentence2\tpromptID\tpairID\n"


read_xnli = partial(read_task, XNLI)


def test_xnli_task_is_a_choice_scored_by_accuracy():
    (task,) = XNLI.tasks("vi")
    assert (task.name, task.kind, task.language, task.metrics[0].name) == ("xnli_vi", "choice", "vi", "accuracy")
    assert len(XNLI.languages) == 15


@pytest.mark.parametrize(
    ("split", "count", "name"), [(None, 2490, "dev-vi.tsv"), ("test", 5010, "test-vi.labelled.tsv.gz")]
)
def test_xnli_publishers_files(split, count, name, shared_data):
    data = read_xnli("vi", shared_data / "eval", split)
    assert (len(data.items), data.split) == (count, split or "validation")
    assert list(data.origin) == [f"xnli/{name}"]
    assert Counter(item.gold for item in data.items) == dict.fromkeys(range(3), count // 3)
    assert [item.id for item in data.items] == [str(number) for number in range(1, count + 1)]
    if split is None:
        assert data.items[0].gold_answer == (
            "Và anh ấy nói, Mẹ, con đã về nhà., đúng? Vì vậy, Ngay khi xuống xe buýt của trường, anh ấy gọi cho mẹ."
        )


@pytest.mark.parametrize("header", ["", "premise\thypothesis\tlabel\n"])
def test_xnli_another_language_in_xtremes_layout(header, tmp_path):
    write_file(tmp_path / "XNLI/dev-de.tsv", header + XNLI_ROWS)
    data = read_xnli("de", tmp_path)
    assert [item.gold for item in data.items] == [0, 1, 2]
    assert data.items[1].choices[0] == 'Es regnet., richtig? Ja, Er sagte "nein'
    assert {item.query for item in data.items} == {""}


def test_xnli_official_file_is_filtered_by_language(tmp_path):
    rows = [
        "en\tneutral\t(x)\tIt rains.\tWet.\t1\t11",
        "ru\tentailment\t(x)\tИдёт дождь.\tМокро.\t1\t11",
        "ru\tcontradiction\t(x)\tИдёт дождь.\tСухо.\t1\t12",
    ]
    write_file(tmp_path / "XNLI-1.0/xnli.dev.tsv", OFFICIAL + "\n".join(rows))
    data = read_xnli("ru", tmp_path)
    assert [(item.id, item.gold) for item in data.items] == [("11", 0), ("12", 2)]
    assert data.items[1].choices[2] == "Идёт дождь., правильно? Нет, Сухо."
    with pytest.raises(UsageError, match=r"xnli_bg: no questions in XNLI-1.0/xnli\.dev\.tsv"):
        read_xnli("bg", tmp_path)


def test_xnli_the_split_that_is_there(tmp_path):
    write_file(tmp_path / "test-es.labelled.tsv.gz", gzip.compress(XNLI_ROWS.encode()))
    assert read_xnli("es", tmp_path).split == "test"
    with pytest.raises(UsageError, match=r"xnli_es: no dev-es\.tsv or xnli\.dev\.tsv below .*facebookresearch/XNLI"):
        read_xnli("es", tmp_path, "validation")
    with pytest.raises(UsageError, match="xnli_es: has no split 'train'; allowed: validation, test"):
        read_xnli("es", tmp_path, "train")


def test_xnli_hub_rows(monkeypatch):
    asked = []

    def rows(*place):
        asked.append(place)
        yield 1, {"premise": "Llueve.", "hypothesis": "Seco.", "label": 2}

    monkeypatch.setattr(tables, "read_hub_records", rows)
    data = read_xnli("es", None)
    assert asked == [("xnli_es", "facebook/xnli", "es", "validation")]
    assert (data.items[0].gold, data.items[0].id, list(data.origin)) == (2, "1", ["facebook/xnli/es"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (XNLI_ROWS + "Es regnet.\tNass.\n", "line 4: 2 columns; expected 3 (premise, hypothesis, label)"),
        (XNLI_ROWS + "a\tb\tperhaps\n", "line 4: label is 'perhaps'; allowed: entailment, neutral, contradiction"),
        (XNLI_ROWS + "a\tb\t-\n", "line 4: label is '-'"),
        (XNLI_ROWS + "\n\tb\tneutral\n", "line 5: 'premise' is empty"),
        ("a\t \tneutral\n", "line 1: 'hypothesis' is empty"),
        (XNLI_ROWS.encode() + b"\xe9\tb\tneutral\n", "line 4: not UTF-8"),
    ],
)
def test_xnli_malformed_files(text, problem, tmp_path):
    path = write_file(tmp_path / "dev-de.tsv", text)
    with pytest.raises(UsageError) as caught:
        read_xnli("de", tmp_path)
    assert str(caught.value).startswith(f"{path}, {problem}")


def test_xnli_malformed_official_file(tmp_path):
    path = write_file(
        tmp_path / "xnli.dev.tsv", OFFICIAL + "de\tneutral\t(x)\ta\tb\t1\t7\nde\tneutral\t(x)\ta\tb\t1\t7\n"
    )
    with pytest.raises(UsageError) as caught:
        read_xnli("de", tmp_path)
    assert str(caught.value) == f"{path}, line 3: the id '7' is that of {path}, line 2 too; ids must be distinct"


read_xcopa = partial(read_task, XCOPA)


def row(**changes: Any) -> dict[str, Any]:
    first = {"premise": "Ho aperto il rubinetto.", "choice1": "L'acqua scorre.", "choice2": "Piove."}
    rest = {"question": "effect", "label": 0, "idx": 5, "changed": False}
    return {name: value for name, value in {**first, **rest, **changes}.items() if value is not ...}


def write_rows(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("language", "split", "count", "used"),
    [("vi", None, 500, "test"), ("vi", "validation", 100, "validation"), ("zh", None, 100, "validation")],
)
def test_xcopa_publishers_files(language, split, count, used, shared_data):
    data = read_xcopa(language, shared_data / "eval", split)
    assert (len(data.items), data.split) == (count, used)
    assert [item.id for item in data.items] == [str(number) for number in range(count)]
    assert list(data.origin) == [f"xcopa/{'test' if used == 'test' else 'val'}.{language}.jsonl"]
    if language == "zh":
        assert data.items[0].query == "那人打开水龙头 所以"
        assert (data.items[0].choices, data.items[0].gold) == (("厕所里满是水。", "水从水龙头喷口流出。"), 1)


def test_xcopa_test_set_that_was_asked_for_and_is_not_there(shared_data):
    with pytest.raises(UsageError, match=r"xcopa_zh: no test\.zh\.jsonl below .*cambridgeltl/xcopa"):
        read_xcopa("zh", shared_data / "eval", "test")


def test_xcopa_another_language(tmp_path):
    write_rows(tmp_path / "data/it/test.it.jsonl", row(), row(idx=6, question="cause", label=1))
    write_rows(tmp_path / "data-gmt/it/test.it.jsonl", row(premise="I opened the tap."))
    data = read_xcopa("it", tmp_path)
    assert [(item.id, item.query, item.gold) for item in data.items] == [
        ("5", "Ho aperto il rubinetto quindi", 0),
        ("6", "Ho aperto il rubinetto perché", 1),
    ]
    assert data.items[0].choices == ("l'acqua scorre.", "piove.")


def test_xcopa_translations_into_english_are_not_the_set(tmp_path):
    write_rows(tmp_path / "data-gmt/it/test.it.jsonl", row())
    with pytest.raises(UsageError, match=r"xcopa_it: no test\.it\.jsonl or val\.it\.jsonl below"):
        read_xcopa("it", tmp_path)


@pytest.mark.parametrize(
    ("name", "split"), [("COPA/val.jsonl", "validation"), ("val.en.jsonl", "validation"), ("test.en.jsonl", "test")]
)
def test_xcopa_english_is_copa(name, split, tmp_path):
    write_rows(tmp_path / name, row(premise="I opened the tap.", choice1="Water flowed.", choice2="It rained."))
    data = read_xcopa("en", tmp_path)
    assert (data.split, data.items[0].query) == (split, "I opened the tap therefore")
    assert data.items[0].choices == (" water flowed.", " it rained.")


def test_xcopa_hub_rows(monkeypatch):
    asked = []

    def rows(*place):
        asked.append(place)
        yield 1, row()

    monkeypatch.setattr(tables, "read_hub_records", rows)
    assert (read_xcopa("it", None).split, read_xcopa("en", None).split) == ("test", "validation")
    assert asked == [
        ("xcopa_it", "cambridgeltl/xcopa", "it", "test"),
        ("xcopa_en", "aps/super_glue", "copa", "validation"),
    ]


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (row(choice1=""), "line 2: 'choice1' is empty"),
        (row(choice2=" "), "line 2: 'choice2' is empty"),
        (row(premise=None), "line 2: 'premise' is null"),
        (row(label=2), "line 2: label is 2; allowed: 0, 1"),
        (row(label=True), "line 2: label is True; allowed: 0, 1"),
        (row(question="reason"), "line 2: question is 'reason'; allowed: cause, effect"),
        (row(choice2=...), "line 2: no 'choice2'; found: premise, choice1"),
        (row(label=...), "line 2: no 'label'"),
        (row(), "line 2: the id '5' is that of"),
        ("{'premise'", "line 2, column 2: broken JSON"),
        ([1], "line 2: list [1]; allowed: an object"),
    ],
)
def test_xcopa_malformed_files(bad, problem, tmp_path):
    path = write_rows(tmp_path / "test.it.jsonl", row(), bad)
    with pytest.raises(UsageError) as caught:
        read_xcopa("it", tmp_path)
    assert str(caught.value).startswith(f"{path}, {problem}")


HEADER = (
    "InputStoryid\tInputSentence1\tInputSentence2\tInputSentence3\tInputSentence4\tRandomFifthSentenceQuiz1\t"
    "RandomFifthSentenceQuiz2\tAnswerRightEnding\n"
)
HUB_HEADER = (
    "story_id\tinput_sentence_1\tinput_sentence_2\tinput_sentence_3\tinput_sentence_4\tsentence_quiz1\t"
    "sentence_quiz2\tanswer_right_ending\n"
)
STORY_ROWS = (
    'a-1\tЭто раз.\tДва.\tТри.\tЧетыре.\tПять.\tШесть.\t1\nb-2\t"Да", сказал он.\tДва.\tТри.\tЧетыре.\tПять.\tВсё.\t2\n'
)


read_story = partial(read_task, XSTORYCLOZE)


def write_story(folder: Path, text: str | bytes, language: str = "ru") -> Path:
    path = folder / f"XStoryCloze/spring2016.val.{language}.tsv.split_20_80_eval.tsv"
    return write_file(path, text)


@pytest.mark.parametrize("header", [HEADER, HUB_HEADER, HEADER.replace("\n", "\r\n")])
def test_xstorycloze_both_spellings_of_the_header(header, tmp_path):
    path = write_story(tmp_path, header + STORY_ROWS)
    data = read_story("ru", tmp_path)
    assert (data.split, list(data.origin)) == ("eval", [f"XStoryCloze/{path.name}"])
    assert [(item.id, item.gold) for item in data.items] == [("a-1", 0), ("b-2", 1)]
    assert data.items[0].query == "Это раз. Два. Три. Четыре."
    assert data.items[1].query == '"Да", сказал он. Два. Три. Четыре.'
    assert data.items[0].choices == ("Пять.", "Шесть.")


def test_xstorycloze_quoted_cells(tmp_path):
    write_story(tmp_path, HEADER + 'a\t"""Да"" и всё."\t"Два."\tТри.\tЧетыре.\tПять.\tШесть.\t"2"\n')
    (item,) = read_story("ru", tmp_path).items
    assert (item.query, item.gold) == ('"Да" и всё. Два. Три. Четыре.', 1)


def test_xstorycloze_hub_rows(monkeypatch):
    asked = []

    def rows(*place):
        asked.append(place)
        names = HUB_HEADER.split()
        yield 1, dict(zip(names, ["a", "1.", "2.", "3.", "4.", "5.", "6.", 2], strict=True))

    monkeypatch.setattr(tables, "read_hub_records", rows)
    (item,) = read_story("ar", None).items
    assert asked == [("xstorycloze_ar", "juletxara/xstory_cloze", "ar", "eval")]
    assert (item.id, item.query, item.choices, item.gold) == ("a", "1. 2. 3. 4.", ("5.", "6."), 1)


def test_xstorycloze_missing_set_and_split(tmp_path):
    with pytest.raises(
        UsageError, match=r"xstorycloze_ar: no spring2016\.val\.ar\.tsv.* get it from https://huggingface"
    ):
        read_story("ar", tmp_path)
    with pytest.raises(UsageError, match="xstorycloze_ar: has no split 'train'; allowed: eval"):
        read_story("ar", tmp_path, "train")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (HEADER + STORY_ROWS + "c\tа.\tб.\n", "line 4: 3 columns; expected 8 (InputStoryid, InputSentence1"),
        (HEADER + STORY_ROWS + "c\tа.\tб.\tв.\tг.\tд.\te.\t3\n", "line 4: answer_right_ending is '3'; allowed: 1, 2"),
        (HEADER + STORY_ROWS + 'c\tа.\tб.\tв.\tг.\t""\te.\t1\n', "line 4: 'sentence_quiz1' is empty"),
        (HEADER + STORY_ROWS + "a-1\tа.\tб.\tв.\tг.\tд.\te.\t1\n", "line 4: the id 'a-1' is that of"),
        (
            HEADER.replace("AnswerRightEnding", "Answer") + STORY_ROWS,
            "line 1: no 'AnswerRightEnding' or 'answer_right_ending'",
        ),
        (STORY_ROWS, "line 1: no 'InputStoryid' or 'story_id'"),
        ((HEADER + STORY_ROWS).encode("cp1251"), "line 2: not UTF-8"),
    ],
)
def test_xstorycloze_malformed_files(text, problem, tmp_path):
    path = write_story(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_story("ru", tmp_path)
    assert str(caught.value).startswith(f"{path}, {problem}")
