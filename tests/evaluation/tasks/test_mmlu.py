"""MMLU in three publishers' layouts, subjects in turn, splits, the Hub, malformed files."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from functools import partial
from typing import Any

import pytest
from benchmark_files import read_task, write_file

from pivotune.errors import UsageError
from pivotune.evaluation.tasks import tables
from pivotune.evaluation.tasks.mmlu import MMLU

pytest.importorskip("lm_eval", reason="lm-evaluation-harness (extra eval) is not installed")

OPENAI_HEADER = ",Question,A,B,C,D,Answer,Subject\n"


read = partial(read_task, MMLU)


def okapi(**changes: Any) -> dict[str, Any]:
    options = {f"option_{letter}": letter * 2 for letter in "abcd"}
    whole = {"instruction": "Was?", **options, "answer": "D", "id": "anatomy/test/0", **changes}
    return {name: value for name, value in whole.items() if value is not ...}


def test_publishers_folder(shared_data):
    data = read("ar", shared_data / "eval")
    counts = Counter(item.details["subject"] for item in data.items)
    assert counts == {"anatomy": 135, "astronomy": 152, "global_facts": 100, "high_school_geography": 198,
                      "machine_learning": 112, "management": 103, "marketing": 234, "world_religions": 171}  # fmt: skip
    assert (data.split, len(data.origin), data.origin[0]) == ("test", 8, "mmlu_ar/test/anatomy_test.csv")
    # Eight subjects take turns, so 40 items are five of each.
    assert set(Counter(item.details["subject"] for item in data.items[:40]).values()) == {5}
    assert [item.id for item in data.items[7:9]] == ["world_religions/1", "anatomy/2"]
    first = next(item for item in data.items if item.id == "global_facts/1")
    assert first.query.splitlines()[1:] == ["A. 10٪", "B. 20٪", "C. 40٪", "D. 80٪", "Answer:"]
    assert (first.choices, first.gold, first.delimiter) == (("A", "B", "C", "D"), 2, " ")


def test_publishers_folder_by_its_own_path_and_split(shared_data):
    data = read("ar", shared_data / "eval/mmlu_ar", "dev")
    assert (data.split, len(data.origin), len(data.items)) == ("dev", 57, 285)


@pytest.mark.parametrize("header", ["", "question,A,B,C,D,answer\n", "Question,a,b,c,d,Answer\n"])
def test_folder_in_another_language(header, tmp_path):
    write_file(tmp_path / "mmlu_de/test/law_test.csv", header + '"Was, wo?",ja,nein,"so ""la la""",nie,C\n')
    packed = gzip.compress(("\ufeff" + header + "Wer?,1,2,3,4,a\n").encode())
    write_file(tmp_path / "mmlu_de/test/anatomy_test.csv.gz", packed)
    data = read("de", tmp_path)
    assert [(item.id, item.gold) for item in data.items] == [("anatomy/1", 0), ("law/1", 2)]
    assert data.items[1].query == 'Was, wo?\nA. ja\nB. nein\nC. so "la la"\nD. nie\nAnswer:'


@pytest.mark.parametrize(
    ("language", "name"), [("es", "mmlu_ES-LA.csv"), ("ja", "test/mmlu_JA-JP.csv"), ("en", "mmlu.csv")]
)
def test_openais_table(language, name, tmp_path):
    write_file(tmp_path / name, OPENAI_HEADER + "0,Uno?,a,b,c,d,B,law\n1,Dos?,a,b,c,d,A,law\n2,Tres?,a,b,c,d,D,art\n")
    data = read(language, tmp_path)
    assert [(item.id, item.gold) for item in data.items] == [("law/1", 1), ("art/1", 3), ("law/2", 0)]
    assert (data.split, list(data.origin)) == ("test", [name])


def test_regions_are_not_chosen_for_the_user(tmp_path):
    for region in ("BR", "PT"):
        write_file(tmp_path / f"test/mmlu_PT-{region}.csv", OPENAI_HEADER + "0,Um?,a,b,c,d,B,law\n")
    with pytest.raises(UsageError, match=r"mmlu_pt: .*mmlu_PT-BR\.csv and .*mmlu_PT-PT\.csv are both there"):
        read("pt", tmp_path)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("m_mmlu/vi_test.json", "test"),
        ("vi_test.jsonl", "test"),
        ("m_mmlu_vi_test.jsonl", "test"),
        ("m_mmlu/vi_val.json", "validation"),
        ("m_mmlu/vi_dev.json", "dev"),
    ],
)
def test_okapis_json(name, split, tmp_path):
    rows = [okapi(), okapi(answer="A", id="law/test/9"), okapi(answer="B", id="anatomy/test/1")]
    lines = "\n".join(json.dumps(row) for row in rows)
    write_file(tmp_path / name, lines if name.endswith("l") else rows)
    data = read("vi", tmp_path)
    assert data.split == split
    assert [(item.id, item.gold) for item in data.items] == [("anatomy/1", 3), ("law/1", 0), ("anatomy/2", 1)]
    assert data.items[0].query == "Was?\nA. aa\nB. bb\nC. cc\nD. dd\nAnswer:"


def test_another_set_beside_it_is_not_taken(tmp_path):
    write_file(tmp_path / "m_arc/vi_test.json", [{"question": "x"}])
    write_file(tmp_path / "m_mmlu/vi_test.json", [okapi(id=3)])
    (item,) = read("vi", tmp_path).items
    assert (item.id, dict(item.details)) == ("mmlu/1", {"subject": "mmlu"})


OPENAI_ROW = {"Question": "q", "A": "w", "B": "e", "C": "r", "D": "t", "Answer": "B", "Subject": "law"}


@pytest.mark.parametrize(
    ("language", "row", "place", "identity", "gold"),
    [
        ("vi", okapi(), ("alexandrainst/m_mmlu", "vi", "test"), "anatomy/1", 3),
        ("ko", OPENAI_ROW, ("openai/MMMLU", "KO_KR", "test"), "law/1", 1),
    ],
)
def test_hub_rows(language, row, place, identity, gold, monkeypatch):
    asked = []

    def rows(*place):
        asked.append(place)
        yield 1, row

    monkeypatch.setattr(tables, "read_hub_records", rows)
    (item,) = read(language, None).items
    assert asked == [(f"mmlu_{language}", *place)]
    assert (item.id, item.gold) == (identity, gold)


def test_hub_names_of_splits(monkeypatch):
    asked = []
    monkeypatch.setattr(tables, "read_hub_records", lambda *place: asked.append(place[-1]) or iter([(1, okapi())]))
    assert [read("vi", None, split).split for split in ("validation", "val", "dev")] == [
        "validation",
        "validation",
        "dev",
    ]
    assert asked == ["val", "val", "train"]


def test_missing_set_language_and_split(tmp_path):
    with pytest.raises(UsageError, match=r"mmlu_vi: no mmlu_vi/test/\*\.csv or mmlu_VI-\*\.csv .*alexandrainst/m_mmlu"):
        read("vi", tmp_path)
    with pytest.raises(UsageError, match="mmlu_vi: has no split 'train'; allowed: test, validation, dev"):
        read("vi", tmp_path, "train")
    with pytest.raises(UsageError, match="mmlu_gl: the Hub has this set in ar, bn"):
        read("gl", None)


def test_a_subject_that_is_there_twice(tmp_path):
    for name in ("law_test.csv", "law_test.csv.gz"):
        write_file(tmp_path / "mmlu_de/test" / name, "a,b,c,d,e,A\n")
    with pytest.raises(UsageError, match=r"mmlu_de: .*law_test\.csv and .*law_test\.csv\.gz are both there"):
        read("de", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (
            "mmlu_de/test/law_test.csv",
            "a,b,c,d,e,A\na,b,c,d,A\n",
            "line 2: 5 columns; expected 6 (question, A, B, C, D",
        ),
        ("mmlu_de/test/law_test.csv", "a,b,c,d,e,A\na,b,c,d,e,E\n", "line 2: answer is 'E'; allowed: A, B, C, D"),
        ("mmlu_de/test/law_test.csv", "a,b,c,d,e,A\na,b,,d,e,A\n", "line 2: 'option_b' is empty"),
        ("mmlu_de/test/law_test.csv", 'a,b,c,d,e,A\na,"b,c,d,e,A\n', "line 2: broken CSV"),
        ("mmlu_de/test/law_test.csv", b"a,b,c,d,e,A\n\xfc,b,c,d,e,A\n", "line 2: not UTF-8"),
        ("mmlu_DE-DE.csv", OPENAI_HEADER.replace("D,", "E,") + "0,a,b,c,d,e,A,x\n", "line 1: 8 columns; expected 6"),
        ("de_test.json", [okapi(), okapi(option_c=...)], "row 2: no 'C' or 'option_c'; found: instruction, option_a"),
        ("de_test.json", [okapi(answer=2)], "row 1: answer is 2; allowed: A, B, C, D"),
        ("de_test.jsonl", json.dumps(okapi()) + "\n{", "line 2, column 2: broken JSON"),
    ],
)
def test_malformed_files(name, content, problem, tmp_path):
    path = write_file(tmp_path / name, content)
    with pytest.raises(UsageError) as caught:
        read("de", tmp_path)
    assert str(caught.value).startswith(f"{path}, {problem}")
