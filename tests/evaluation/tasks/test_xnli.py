"""XNLI: real files, XTREME's and XNLI-1.0's layouts in other languages, splits, the Hub, malformed files."""

from __future__ import annotations

import gzip
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from benchmark_files import read_task

from pivotune.errors import UsageError
from pivotune.evaluation.tasks import tables
from pivotune.evaluation.tasks.understanding import XNLI

pytest.importorskip("lm_eval", reason="lm-evaluation-harness (extra eval) is not installed")

ROWS = (
    'Es regnet.\tEs ist nass.\tentailment\nEs regnet.\tEr sagte "nein\tneutral\nEs regnet.\tTrocken.\tcontradictory\n'
)
OFFICIAL = "language\tgold_label\tsentence1_parse\tsentence1\tsentence2\tpromptID\tpairID\n"


read = partial(read_task, XNLI)


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_task_is_a_choice_scored_by_accuracy():
    (task,) = XNLI.tasks("vi")
    assert (task.name, task.kind, task.language, task.metrics[0].name) == ("xnli_vi", "choice", "vi", "accuracy")
    assert len(XNLI.languages) == 15


@pytest.mark.parametrize(
    ("split", "count", "name"), [(None, 2490, "dev-vi.tsv"), ("test", 5010, "test-vi.labelled.tsv.gz")]
)
def test_publishers_files(split, count, name, shared_data):
    data = read("vi", shared_data / "eval", split)
    assert (len(data.items), data.split) == (count, split or "validation")
    assert list(data.origin) == [f"xnli/{name}"]
    assert Counter(item.gold for item in data.items) == dict.fromkeys(range(3), count // 3)
    assert [item.id for item in data.items] == [str(number) for number in range(1, count + 1)]
    if split is None:
        assert data.items[0].gold_answer == (
            "Và anh ấy nói, Mẹ, con đã về nhà., đúng? Vì vậy, Ngay khi xuống xe buýt của trường, anh ấy gọi cho mẹ."
        )


@pytest.mark.parametrize("header", ["", "premise\thypothesis\tlabel\n"])
def test_another_language_in_xtremes_layout(header, tmp_path):
    write(tmp_path / "XNLI/dev-de.tsv", header + ROWS)
    data = read("de", tmp_path)
    assert [item.gold for item in data.items] == [0, 1, 2]
    assert data.items[1].choices[0] == 'Es regnet., richtig? Ja, Er sagte "nein'
    assert {item.query for item in data.items} == {""}


def test_official_file_is_filtered_by_language(tmp_path):
    rows = [
        "en\tneutral\t(x)\tIt rains.\tWet.\t1\t11",
        "ru\tentailment\t(x)\tИдёт дождь.\tМокро.\t1\t11",
        "ru\tcontradiction\t(x)\tИдёт дождь.\tСухо.\t1\t12",
    ]
    write(tmp_path / "XNLI-1.0/xnli.dev.tsv", OFFICIAL + "\n".join(rows))
    data = read("ru", tmp_path)
    assert [(item.id, item.gold) for item in data.items] == [("11", 0), ("12", 2)]
    assert data.items[1].choices[2] == "Идёт дождь., правильно? Нет, Сухо."
    with pytest.raises(UsageError, match=r"xnli_bg: no questions in XNLI-1.0/xnli\.dev\.tsv"):
        read("bg", tmp_path)


def test_the_split_that_is_there(tmp_path):
    write(tmp_path / "test-es.labelled.tsv.gz", gzip.compress(ROWS.encode()))
    assert read("es", tmp_path).split == "test"
    with pytest.raises(UsageError, match=r"xnli_es: no dev-es\.tsv or xnli\.dev\.tsv below .*facebookresearch/XNLI"):
        read("es", tmp_path, "validation")
    with pytest.raises(UsageError, match="xnli_es: has no split 'train'; allowed: validation, test"):
        read("es", tmp_path, "train")


def test_hub_rows(monkeypatch):
    asked = []

    def rows(*place):
        asked.append(place)
        yield 1, {"premise": "Llueve.", "hypothesis": "Seco.", "label": 2}

    monkeypatch.setattr(tables, "read_hub_records", rows)
    data = read("es", None)
    assert asked == [("xnli_es", "facebook/xnli", "es", "validation")]
    assert (data.items[0].gold, data.items[0].id, list(data.origin)) == (2, "1", ["facebook/xnli/es"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (ROWS + "Es regnet.\tNass.\n", "line 4: 2 columns; expected 3 (premise, hypothesis, label)"),
        (ROWS + "a\tb\tperhaps\n", "line 4: label is 'perhaps'; allowed: entailment, neutral, contradiction"),
        (ROWS + "a\tb\t-\n", "line 4: label is '-'"),
        (ROWS + "\n\tb\tneutral\n", "line 5: 'premise' is empty"),
        ("a\t \tneutral\n", "line 1: 'hypothesis' is empty"),
        (ROWS.encode() + b"\xe9\tb\tneutral\n", "line 4: not UTF-8"),
    ],
)
def test_malformed_files(text, problem, tmp_path):
    path = write(tmp_path / "dev-de.tsv", text)
    with pytest.raises(UsageError) as caught:
        read("de", tmp_path)
    assert str(caught.value).startswith(f"{path}, {problem}")


def test_malformed_official_file(tmp_path):
    path = write(tmp_path / "xnli.dev.tsv", OFFICIAL + "de\tneutral\t(x)\ta\tb\t1\t7\nde\tneutral\t(x)\ta\tb\t1\t7\n")
    with pytest.raises(UsageError) as caught:
        read("de", tmp_path)
    assert str(caught.value) == f"{path}, line 3: the id '7' is that of {path}, line 2 too; ids must be distinct"
