"""MKQA: the publisher's format, answer types and aliases, left out questions, yes and no, and malformed files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pivotune.errors import UsageError
from pivotune.evaluation.tasks import tables
from pivotune.evaluation.tasks.base import Item, TaskData
from pivotune.evaluation.tasks.question_answering import MKQA
from pivotune.evaluation.tasks.tables import Source


def answer(answer_type: Any = "entity", text: Any = "Hà Nội", **more: Any) -> dict:
    return {"type": answer_type, "text": text, **more}


def record(*answers: Any, key: str = "vi", query: Any = "thủ đô việt nam ở đâu", **more: Any) -> dict:
    return {"query": "where is it", "queries": {key: query}, "answers": {key: list(answers)}, **more}


def write(folder: Path, *records: Any, name: str = "mkqa.jsonl") -> Path:
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in records)
    path = folder / name
    path.write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
    return path


def read(folder: Path | None, language: str = "vi", split: str | None = None) -> TaskData:
    (task,) = MKQA.tasks(language)
    return task.read(Source(folder, split))


def read_one(folder: Path, *answers: Any, language: str = "vi", key: str | None = None) -> Item:
    write(folder, record(*answers, key=key or language))
    (item,) = read(folder, language).items
    return item


def score(text: str, item: Item, language: str = "vi") -> tuple[float, float]:
    (task,) = MKQA.tasks(language)
    assert task.score is not None
    numbers = task.score(text, item)
    return numbers["f1"], numbers["exact_match"]


@pytest.mark.parametrize("language", MKQA.languages)
def test_publishers_rows_in_every_language(language, shared_data):
    data = read(shared_data / "eval", language)
    assert [item.id for item in data.items] == ["36228854473990432", "-7449157003522518870", "7631360939705650347"]
    assert data.left_out == {"long_answer": 1, "unanswerable": 2}
    assert data.split == "train"
    assert all(score(item.gold_answer, item, language) == (1.0, 1.0) for item in data.items)


def test_there_are_26_languages_and_chinese_is_simplified_unless_said_otherwise(shared_data):
    assert len(set(MKQA.languages)) == 26
    with gzip.open(shared_data / "eval" / "mkqa_format" / "test_mkqa.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = {str(row["example_id"]): row for row in map(json.loads, file)}
    for language, key in (("zh", "zh_cn"), ("zh_hk", "zh_hk"), ("zh_tw", "zh_tw")):
        items = read(shared_data / "eval", language).items
        assert [item.query for item in items] == [rows[item.id]["queries"][key] for item in items]
        assert [item.gold_answer for item in items] == [rows[item.id]["answers"][key][0]["text"] for item in items]


def test_a_real_question(shared_data):
    item = read(shared_data / "eval").items[0]
    with gzip.open(shared_data / "eval" / "mkqa_format" / "test_mkqa.jsonl.gz", "rt", encoding="utf-8") as file:
        row = json.loads(file.readline())
    assert item.query == row["queries"]["vi"]
    assert item.references[:3] == ("2017", "2017-05-18", "18/05/2017")
    assert item.details == {"types": ["date"]}
    assert score("18-05-2017", item) == (1.0, 1.0)
    # ngày 18 tháng năm 2017 (5 tokens), 18 tháng năm 2017 (4), 4 common: 8 / 9
    assert score("Ngày 18 tháng Năm 2017", item) == (pytest.approx(8 / 9), 0.0)


def test_task():
    (task,) = MKQA.tasks("zh_hk")
    assert (task.name, task.language, task.answer_language) == ("mkqa_zh_hk", "zh_hk", "zh")
    assert (task.benchmark, task.kind) == ("mkqa", "answer")
    assert [metric.name for metric in task.metrics] == ["f1", "exact_match"]


def test_texts_and_aliases_of_all_answers_are_gold_each_once(tmp_path):
    item = read_one(
        tmp_path,
        answer(text=" Hà Nội ", aliases=["Thăng Long", "Hà Nội"]),
        answer("short_phrase", "Đông Đô", aliases=None),
    )
    assert item == Item(
        "1", "thủ đô việt nam ở đâu", ("Hà Nội", "Thăng Long", "Đông Đô"), details={"types": ["entity", "short_phrase"]}
    )
    assert score("Đông Đô", item) == (1.0, 1.0)
    assert score("", item) == (0.0, 0.0)


def test_answers_are_normalised_by_the_rules_of_mkqa(tmp_path):
    item = read_one(tmp_path, answer("date", "1998年"), language="zh", key="zh_cn")
    # 1 9 9 9 年 against 1 9 9 8 年, 4 of 5 in common; by MLQA's rules 1 of 2 (1999 年, 1998 年)
    assert score("1999年", item, "zh") == (pytest.approx(0.8), 0.0)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([answer("unanswerable", None)], "unanswerable"),
        ([answer("long_answer", None, aliases=[])], "long_answer"),
        ([answer("entity", None, aliases=[""])], "no answer text"),
        ([answer("entity", "  "), answer("long_answer", None)], "long_answer"),
    ],
)
def test_questions_without_a_short_answer_are_left_out_and_counted(tmp_path, answers, reason):
    write(tmp_path, record(*answers), record(answer()), record(*answers))
    data = read(tmp_path)
    assert [item.id for item in data.items] == ["2"]
    assert data.left_out == {reason: 2}


def test_an_empty_answer_is_right_beside_an_unanswerable_gold_answer(tmp_path):
    item = read_one(tmp_path, answer("unanswerable", None), answer(text="Huế"))
    assert item.references == ("Huế", "")
    assert item.gold_answer == "Huế"
    assert score("", item) == score("Huế", item) == (1.0, 1.0)


@pytest.mark.parametrize("language", MKQA.languages)
def test_yes_and_no_are_known_in_every_language(tmp_path, language):
    key = {"zh": "zh_cn"}.get(language, language)
    for gold, other in (("yes", "no"), ("no", "yes")):
        item = read_one(tmp_path, answer("binary", gold), language=language, key=key)
        opposite = read_one(tmp_path, answer("binary", other), language=language, key=key)
        assert item.references[-1] == gold
        # The likelihood of the first is reported, so it must be the language's own word.
        assert (item.references[0] == gold) == (language == "en" or (gold == "no" and language in ("es", "it")))
        assert all(score(text, item, language) == (1.0, 1.0) for text in item.references)
        assert not any(score(text, opposite, language)[1] for text in item.references)


def test_yes_and_no_words_count_only_for_yes_no_questions(tmp_path):
    item = read_one(tmp_path, answer("binary", "yes", aliases=["true"]))
    assert item.references == ("có", "đúng", "phải", "vâng", "yes", "true")
    assert score("Có.", item) == (1.0, 1.0)
    assert read_one(tmp_path, answer("short_phrase", "yes")).references == ("yes",)
    assert read_one(tmp_path, answer("binary", "Không hẳn")).references == ("Không hẳn",)


def test_the_publishers_file_is_found_gzipped_and_before_others_of_a_similar_name(tmp_path):
    write(tmp_path, record(answer(), example_id=-5), name="mkqa.jsonl.gz")
    write(tmp_path, record(answer(), example_id="other"), name="test_mkqa.jsonl.gz")
    assert [item.id for item in read(tmp_path).items] == ["-5"]


def test_a_set_or_split_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"mkqa_vi: no mkqa\.jsonl or \*mkqa\*\.jsonl below .* get it from https://"):
        read(tmp_path)
    with pytest.raises(UsageError, match="mkqa_vi: has no split 'test'; allowed: train"):
        read(tmp_path, split="test")
    for name in ("my_mkqa.jsonl", "mkqa_small.jsonl.gz"):
        write(tmp_path, record(answer()), name=name)
    with pytest.raises(UsageError, match=r"mkqa_small\.jsonl\.gz and .*my_mkqa\.jsonl are both"):
        read(tmp_path)


MALFORMED = [
    ("{", "line 2, column 2: broken JSON"),
    ("[]", "line 2: list []; allowed: an object"),
    ({"answers": {}}, "line 2: no 'queries'; found 'answers'"),
    ({"queries": {"vi": "?"}}, "line 2: no 'answers'; found 'queries'"),
    (record(answer(), key="de"), "line 2, 'queries': no 'vi'; found 'de'"),
    (record(answer(), query=" "), "line 2, 'queries': 'vi' is empty; text is needed"),
    ({**record(answer()), "answers": {"de": []}}, "line 2, 'answers': no 'vi'; found 'de'"),
    (record(), "line 2, 'answers': 'vi' is empty; at least one answer is needed"),
    (record("Huế"), "line 2, answer 1 in 'vi': found text, where an object with 'type' is needed"),
    (record(answer(), {"text": "x"}), "line 2, answer 2 in 'vi': no 'type'; found 'text'"),
    (
        record(answer("city")),
        "line 2, answer 1 in 'vi': unknown type 'city'; allowed: entity, long_answer, unanswerable",
    ),
    (record(answer(8)), "line 2, answer 1 in 'vi': 'type' is a number"),
    (record({"type": "entity"}), "line 2, answer 1 in 'vi': no 'text'; found 'type'"),
    (record(answer(text=3)), "line 2, answer 1 in 'vi': 'text' is a number; text is needed"),
    (record(answer(aliases="x")), "line 2, answer 1 in 'vi': 'aliases' is text; a list is needed"),
    (record(answer(aliases=["x", 5])), "line 2, answer 1 in 'vi': 'alias 2' is a number; text is needed"),
    (record(answer(text="\udc00")), "line 2, answer 1 in 'vi': 'text' holds half of a surrogate pair"),
    (record(answer(), example_id=None), "line 2: 'example_id' is null; text is needed"),
    (record(answer(), example_id=9), "line 2: the id '9' is that of "),
]


@pytest.mark.parametrize(("row", "message"), MALFORMED)
def test_malformed_rows(tmp_path, row, message):
    path = write(tmp_path, record(answer(), example_id=9), row)
    with pytest.raises(UsageError) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(f"{path}, {message}")
    assert "\n" not in str(caught.value)


def test_a_file_with_nothing_to_ask(tmp_path):
    write(tmp_path, record(answer("unanswerable", None)))
    with pytest.raises(UsageError, match=r"mkqa_vi: no questions in mkqa\.jsonl$"):
        read(tmp_path)


def test_hub_has_types_as_numbers(monkeypatch, tmp_path):
    rows = [
        record(answer(7, "no", entity="", aliases=[]), example_id="10"),
        record(answer(2, None, entity="", aliases=[]), example_id="11"),
        record(answer(0, "Huế", entity="Q1", aliases=["Phú Xuân"]), example_id="12"),
    ]
    asked = []

    def read_hub(*names):
        asked.append(names)
        return enumerate(rows, start=1)

    monkeypatch.setattr(tables, "read_hub_records", read_hub)
    data = read(None)
    assert asked == [("mkqa_vi", "apple/mkqa", "mkqa", "train")]
    assert (data.origin, data.left_out) == (["apple/mkqa/mkqa"], {"unanswerable": 1})
    assert [(item.id, item.references, item.details["types"]) for item in data.items] == [
        ("10", ("không", "no"), ["binary"]),
        ("12", ("Huế", "Phú Xuân"), ["entity"]),
    ]
    rows[0]["answers"]["vi"][0]["type"] = "town"
    with pytest.raises(UsageError, match=r"^apple/mkqa/mkqa, row 1, answer 1 in 'vi': unknown type 'town'"):
        read(None)


def test_hub_has_only_the_published_languages():
    with pytest.raises(UsageError, match=r"mkqa_cs: the Hub has this set in ar, da, .*--data-dir"):
        read(None, "cs")
