"""XCOPA and COPA: real files, other languages, the validation set where the test set is not there, malformed files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import read_task

from pivotune.errors import UsageError
from pivotune.evaluation.tasks import tables
from pivotune.evaluation.tasks.understanding import XCOPA

pytest.importorskip("lm_eval", reason="lm-evaluation-harness (extra eval) is not installed")


read = partial(read_task, XCOPA)


def row(**changes: Any) -> dict[str, Any]:
    first = {"premise": "Ho aperto il rubinetto.", "choice1": "L'acqua scorre.", "choice2": "Piove."}
    rest = {"question": "effect", "label": 0, "idx": 5, "changed": False}
    return {name: value for name, value in {**first, **rest, **changes}.items() if value is not ...}


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("language", "split", "count", "used"),
    [("vi", None, 500, "test"), ("vi", "validation", 100, "validation"), ("zh", None, 100, "validation")],
)
def test_publishers_files(language, split, count, used, shared_data):
    data = read(language, shared_data / "eval", split)
    assert (len(data.items), data.split) == (count, used)
    assert [item.id for item in data.items] == [str(number) for number in range(count)]
    assert list(data.origin) == [f"xcopa/{'test' if used == 'test' else 'val'}.{language}.jsonl"]
    if language == "zh":
        assert data.items[0].query == "那人打开水龙头 所以"
        assert (data.items[0].choices, data.items[0].gold) == (("厕所里满是水。", "水从水龙头喷口流出。"), 1)


def test_test_set_that_was_asked_for_and_is_not_there(shared_data):
    with pytest.raises(UsageError, match=r"xcopa_zh: no test\.zh\.jsonl below .*cambridgeltl/xcopa"):
        read("zh", shared_data / "eval", "test")


def test_another_language(tmp_path):
    write(tmp_path / "data/it/test.it.jsonl", row(), row(idx=6, question="cause", label=1))
    write(tmp_path / "data-gmt/it/test.it.jsonl", row(premise="I opened the tap."))
    data = read("it", tmp_path)
    assert [(item.id, item.query, item.gold) for item in data.items] == [
        ("5", "Ho aperto il rubinetto quindi", 0),
        ("6", "Ho aperto il rubinetto perché", 1),
    ]
    assert data.items[0].choices == ("l'acqua scorre.", "piove.")


def test_translations_into_english_are_not_the_set(tmp_path):
    write(tmp_path / "data-gmt/it/test.it.jsonl", row())
    with pytest.raises(UsageError, match=r"xcopa_it: no test\.it\.jsonl or val\.it\.jsonl below"):
        read("it", tmp_path)


@pytest.mark.parametrize(
    ("name", "split"), [("COPA/val.jsonl", "validation"), ("val.en.jsonl", "validation"), ("test.en.jsonl", "test")]
)
def test_english_is_copa(name, split, tmp_path):
    write(tmp_path / name, row(premise="I opened the tap.", choice1="Water flowed.", choice2="It rained."))
    data = read("en", tmp_path)
    assert (data.split, data.items[0].query) == (split, "I opened the tap therefore")
    assert data.items[0].choices == (" water flowed.", " it rained.")


def test_hub_rows(monkeypatch):
    asked = []

    def rows(*place):
        asked.append(place)
        yield 1, row()

    monkeypatch.setattr(tables, "read_hub_records", rows)
    assert (read("it", None).split, read("en", None).split) == ("test", "validation")
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
def test_malformed_files(bad, problem, tmp_path):
    path = write(tmp_path / "test.it.jsonl", row(), bad)
    with pytest.raises(UsageError) as caught:
        read("it", tmp_path)
    assert str(caught.value).startswith(f"{path}, {problem}")
