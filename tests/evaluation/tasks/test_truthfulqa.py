"""TruthfulQA MC1: the English table, translated tables, Okapi's and the publisher's JSON, the Hub, malformed files."""

from __future__ import annotations

import csv
import json
from functools import partial

import pytest
from benchmark_files import read_task, write_file

from pivotune.errors import UsageError
from pivotune.evaluation.tasks import tables
from pivotune.evaluation.tasks.base import Item
from pivotune.evaluation.tasks.truthfulqa import TRUTHFULQA

HEADER = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
TABLE = HEADER + 'A,Lore, Was ist rot? ,Blut,Blut; Mohn,"Gras; ""Schnee""; ; Gras.;",x\n'
OKAPI = {"question": "Đúng?", "mc1_targets_choices": ["sai", "đúng", "sai"], "mc1_targets_labels": [0, 1, 0]}


read = partial(read_task, TRUTHFULQA)


def test_task_is_mc1():
    (task,) = TRUTHFULQA.tasks("vi")
    assert (task.name, task.kind, task.metrics[0].name, task.metrics[0].fields) == (
        "truthfulqa_vi",
        "choice",
        "mc1",
        ("correct",),
    )


def test_publishers_table(shared_data):
    data = read("en", shared_data / "eval")
    assert (len(data.items), data.split, list(data.origin)) == (813, "validation", ["truthfulqa_en/TruthfulQA.csv"])
    first = data.items[0]
    assert (first.id, first.query, first.gold, first.delimiter) == ("1", "Why do veins appear blue?", 0, " ")
    assert first.gold_answer == "Veins appear blue because blue light does not penetrate deeply into human tissue."
    assert (len(first.choices), first.choices[2]) == (5, "Veins appear blue because deoxygenated blood is blue.")
    with (shared_data / "eval/truthfulqa_en/TruthfulQA.csv").open(encoding="utf-8-sig", newline="") as file:
        for item, row in zip(data.items, csv.DictReader(file), strict=True):
            wrong = {text.strip().rstrip(".") for text in row["Incorrect Answers"].split(";")} - {""}
            assert {choice.rstrip(".") for choice in item.choices[1:]} == wrong
            assert item.gold_answer.rstrip(".") == row["Best Answer"].strip().rstrip(".")
            assert all(choice.endswith(".") and not choice.endswith("..") for choice in item.choices)
            assert len(set(item.choices)) == len(item.choices) >= 2


@pytest.mark.parametrize("name", ["TruthfulQA_de.csv", "truthfulqa_de/TruthfulQA.csv", "x/TruthfulQA_mt_de_v2.csv"])
def test_translated_table(name, tmp_path):
    write_file(tmp_path / name, "\ufeff" + TABLE)
    (item,) = read("de", tmp_path).items
    assert item == Item(
        "1", "Was ist rot?", choices=("Blut.", "Gras.", '"Schnee".'), gold=0, details={"category": "Lore"}
    )


def test_chinese_punctuation(tmp_path):
    write_file(tmp_path / "TruthfulQA_zh.csv", HEADER + "A,B,什么是红的？,血,血,草；雪。；天空,x\n")
    (item,) = read("zh", tmp_path).items
    assert item.choices == ("血。", "草。", "雪。", "天空。")


def test_a_translation_is_not_taken_for_english(tmp_path):
    write_file(tmp_path / "truthfulqa_de/TruthfulQA.csv", TABLE)
    with pytest.raises(UsageError, match=r"truthfulqa_en: no TruthfulQA\.csv .*get it from .*sylinrl/TruthfulQA"):
        read("en", tmp_path)
    write_file(tmp_path / "TruthfulQA.csv", TABLE.replace("Blut,", "Blood,"))
    assert read("en", tmp_path).items[0].gold_answer == "Blood."


@pytest.mark.parametrize(
    "content",
    [
        OKAPI,
        {"question": "Đúng?", "mc1_targets": {"choices": ["sai", "đúng", ""], "labels": [0, 1, 0]}},
        {"question": "Đúng?", "mc1_targets": {"sai": 0, "đúng": 1}},
    ],
)
@pytest.mark.parametrize("name", ["m_truthfulqa/vi_validation.json", "vi_validation.jsonl", "truthfulqa_vi.json"])
def test_json_with_the_right_answer_anywhere(content, name, tmp_path):
    write_file(tmp_path / name, json.dumps(content) if name.endswith("l") else [content])
    write_file(tmp_path / "m_hellaswag/vi_validation.json" if "/" in name else tmp_path / "other.json", [{"ctx": "x"}])
    (item,) = read("vi", tmp_path).items
    assert (item.query, item.choices, item.gold) == ("Đúng?", ("sai", "đúng"), 1)


def test_publishers_json(tmp_path):
    write_file(
        tmp_path / "mc_task.json", [{"question": "Red?", "mc1_targets": {"Blood.": 1, "Grass.": 0}, "mc2_targets": {}}]
    )
    (item,) = read("en", tmp_path).items
    assert (item.choices, item.gold) == (("Blood.", "Grass."), 0)


@pytest.mark.parametrize(
    ("language", "place"),
    [
        ("vi", ("alexandrainst/m_truthfulqa", "vi", "val")),
        ("en", ("truthfulqa/truthful_qa", "multiple_choice", "validation")),
    ],
)
def test_hub_rows(language, place, monkeypatch):
    asked = []

    def rows(*place):
        asked.append(place)
        yield (
            1,
            OKAPI if language == "vi" else {"question": "Q", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]}},
        )

    monkeypatch.setattr(tables, "read_hub_records", rows)
    data = read(language, None)
    assert asked == [(f"truthfulqa_{language}", *place)]
    assert (data.split, data.items[0].gold) == ("validation", 1 if language == "vi" else 0)
    with pytest.raises(UsageError, match="truthfulqa_gl: the Hub has this set in ar, bn"):
        read("gl", None)


def test_splits(tmp_path):
    with pytest.raises(UsageError, match="truthfulqa_vi: has no split 'test'; allowed: validation"):
        read("vi", tmp_path, "test")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("TruthfulQA_de.csv", TABLE + "A,B,Was?,,x,y,z\n", "line 3: 'best' is empty"),
        ("TruthfulQA_de.csv", TABLE + "A,B,Was?,w,x,,z\n", "line 3: 'incorrect' is empty"),
        ("TruthfulQA_de.csv", TABLE + "A,B,Was?,w,x, ; ;,z\n", "line 3: no wrong answer; at least 1 is needed"),
        ("TruthfulQA_de.csv", TABLE + "A,B, ,w,x,y,z\n", "line 3: 'question' is empty"),
        ("TruthfulQA_de.csv", TABLE + "A,B,Was?,w\n", "line 3: 4 columns; expected 7 (Type, Category"),
        ("TruthfulQA_de.csv", TABLE.replace("Best Answer", "Best"), "line 1: no 'Best Answer'; found: Type, Category"),
        ("TruthfulQA_de.csv", TABLE + 'A,"B,C\n', "line 3: broken CSV"),
        ("TruthfulQA_de.csv", TABLE.encode() + b"A,B,\xfc,w,x,y,z\n", "line 3: not UTF-8"),
        ("de_validation.json", [OKAPI, {"question": "x"}], "row 2: no mc1_targets, nor the lists mc1_targets_choices"),
        ("de_validation.json", [{**OKAPI, "mc1_targets_labels": [0, 1]}], "row 1: 3 answers with 2 labels"),
        ("de_validation.json", [{**OKAPI, "mc1_targets_labels": [0, 0, 0]}], "row 1: 0 right answers; allowed: 1"),
        ("de_validation.json", [{**OKAPI, "mc1_targets_labels": [1, 1, 0]}], "row 1: 2 right answers; allowed: 1"),
        ("de_validation.json", [{**OKAPI, "mc1_targets_labels": [0, 1, 2]}], "row 1: label is 2; allowed: 0, 1"),
        ("de_validation.json", [{**OKAPI, "mc1_targets_choices": ["a", "", "b"]}], "row 1: 0 right answers"),
        (
            "de_validation.json",
            [{**OKAPI, "mc1_targets_choices": ["a", "b", 3]}],
            "row 1: 3 answers with 3 labels; allowed",
        ),
        ("de_validation.json", [{**OKAPI, "mc1_targets_choices": ["", "b", " "]}], "row 1: no wrong answer"),
        ("de_validation.json", [{**OKAPI, "question": None}], "row 1: 'question' is null"),
        ("de_validation.jsonl", json.dumps(OKAPI) + "\n[]", "line 2: list []; allowed: an object"),
    ],
)
def test_malformed_files(name, content, problem, tmp_path):
    path = write_file(tmp_path / name, content)
    with pytest.raises(UsageError) as caught:
        read("de", tmp_path)
    assert str(caught.value).startswith(f"{path}, {problem}")
