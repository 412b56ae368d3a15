"""Texts equal to the harness's, character by character; other tasks of the harness by name."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness (extra eval) is not installed")

from datasets import Dataset

from pivotune.errors import UsageError
from pivotune.evaluation.tasks import harness
from pivotune.evaluation.tasks.base import Item
from pivotune.evaluation.tasks.harness import harness_items, harness_task
from pivotune.evaluation.tasks.tables import Source
from pivotune.evaluation.tasks.understanding import XCOPA, XNLI

_MMLU = {"instruction": " Was? ", "option_a": "1", "option_b": "2", "option_c": "3", "option_d": "4", "answer": "C"}
_STORY = {f"input_sentence_{number}": f"Satz {number}." for number in range(1, 5)} | {
    "sentence_quiz1": "Ende \"a\".", "sentence_quiz2": "Ende 'b'\n.", "answer_right_ending": 2, "story_id": "s",
}  # fmt: skip
_COPA = {"premise": "It rained. ", "choice1": "We got wet.", "choice2": "He ran.", "question": "effect", "label": 0}


def harness_requests(name: str, docs: Sequence[Mapping[str, Any]]) -> list[tuple[Any, Mapping[str, Any], list[Any]]]:
    """(task, record, its requests: context and continuation of every choice) as the harness builds them itself."""
    data = Dataset.from_list([dict(doc) for doc in docs])
    splits = dict.fromkeys(("train", "validation", "test", "eval"), data)
    with harness._quiet():
        spec = {"group": "check", "task": [{"task": name, "custom_dataset": lambda **_: splits}]}
        task = harness._task_manager().load(spec)["tasks"][name]
        task.build_all_requests(apply_chat_template=False)
    grouped: dict[int, list[Any]] = {}
    for instance in task.instances:
        grouped.setdefault(instance.doc_id, []).append(instance)
    return [(task, docs[number], [instance.args for instance in grouped[number]]) for number in sorted(grouped)]


def assert_same_requests(name: str, docs: Sequence[Mapping[str, Any]], items: Sequence[Item]) -> None:
    theirs = harness_requests(name, docs)
    assert len(theirs) == len(items) > 0
    for (task, doc, requests), item in zip(theirs, items, strict=True):
        assert [(item.query, item.delimiter + choice) for choice in item.choices] == requests
        for best in range(len(item.choices)):
            lls = [(-1.0 if index == best else -2.0, False) for index in range(len(item.choices))]
            assert task.process_results(doc, lls)["acc"] == float(best == item.gold)


def rows_of(path: Path, count: int) -> list[list[str]]:
    with path.open(encoding="utf-8") as file:
        return [line.rstrip("\n").split("\t") for line, _ in zip(file, range(count), strict=False)]


@pytest.mark.parametrize("language", ["vi", "en", "zh"])
def test_xnli_on_the_publishers_file(language, shared_data):
    (task,) = XNLI.tasks(language)
    items = task.read(Source(shared_data / "eval")).items[:60]
    labels = {"entailment": 0, "neutral": 1, "contradiction": 2}
    docs = [
        {"premise": premise, "hypothesis": hypothesis, "label": labels[label]}
        for premise, hypothesis, label in rows_of(shared_data / f"eval/xnli/dev-{language}.tsv", 60)
    ]
    assert_same_requests(f"xnli_{language}", docs, items)


@pytest.mark.parametrize(("language", "part"), [("vi", "test"), ("vi", "val"), ("zh", "val")])
def test_xcopa_on_the_publishers_file(language, part, shared_data):
    (task,) = XCOPA.tasks(language)
    items = task.read(Source(shared_data / "eval", {"val": "validation"}.get(part, part))).items
    data = Dataset.from_json(str(shared_data / f"eval/xcopa/{part}.{language}.jsonl"), split="train")
    assert_same_requests(f"xcopa_{language}", list(data), items)


@pytest.mark.parametrize(
    ("name", "doc"), [("m_mmlu_vi", _MMLU), ("m_mmlu_en", _MMLU), ("xstorycloze_zh", _STORY), ("copa", _COPA)]
)
def test_other_sets_of_ours(name, doc):
    other = {**doc, **({"answer": "A"} if "answer" in doc else {}), **({"label": 1} if "label" in doc else {})}
    items = harness_items(name, {"a": doc, "b": other}, {"b": {"subject": "x"}})
    assert_same_requests(name, [doc, other], items)
    assert [item.id for item in items] == ["a", "b"]
    assert [dict(item.details) for item in items] == [{}, {"subject": "x"}]


def test_texts_of_one_item_by_hand():
    (item,) = harness_items("xnli_de", {"1": {"premise": "Es regnet.", "hypothesis": "Es ist nass.", "label": 2}})
    assert item == Item(
        "1",
        "",
        choices=(
            "Es regnet., richtig? Ja, Es ist nass.",
            "Es regnet., richtig? Auch, Es ist nass.",
            "Es regnet., richtig? Nein, Es ist nass.",
        ),
        gold=2,
    )
    (item,) = harness_items("copa", {"1": _COPA})
    # The harness's English task has a space in the choices besides the delimiter.
    assert (item.query, item.choices, item.gold) == ("It rained therefore", (" we got wet.", " he ran."), 0)


def test_a_label_out_of_range_is_an_error():
    doc = {"premise": "a", "hypothesis": "b", "label": 0}
    with pytest.raises(UsageError, match="xnli_vi, item 7: answer 3; allowed: one of 3"):
        harness_items("xnli_vi", {"6": doc, "7": {**doc, "label": 3}})


def test_the_index_of_tasks_is_built_once_and_quietly(caplog, capfd):
    with caplog.at_level(logging.DEBUG):
        manager = harness._task_manager()
        harness_items("xcopa_it", {"1": {**_COPA, "question": "cause"}})
    assert harness._task_manager() is manager
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert not [record for record in caplog.records if record.name.startswith("lm_eval")]


@pytest.mark.parametrize(
    ("name", "language"),
    [("belebele_vie_Latn", "vi"), ("arc_vi", "vi"), ("hellaswag", "und"), ("arc_easy", "und"), ("piqa", "und")],
)
def test_multiple_choice_tasks_by_their_own_name(name, language):
    task = harness_task(name)
    assert task is not None
    assert (task.name, task.benchmark, task.language, task.kind) == (name, name, language, "choice")
    assert [(metric.name, metric.fields, metric.scale) for metric in task.metrics] == [
        ("accuracy", ("correct",), 100.0)
    ]


def test_unknown_names_are_left_to_the_caller():
    assert harness_task("belebele_klingon") is None


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("gsm8k", "gsm8k: a task of kind generate_until is not scored here; `lm_eval --model hf "
                  "--model_args pretrained=RUN/model --tasks gsm8k` runs it"),
        ("wikitext", "of kind loglikelihood_rolling is not scored here"),
        ("lambada_openai", "of kind loglikelihood is not scored here"),
        ("squadv2", "of kind Python class is not scored here"),
        ("mmlu", "mmlu: a group of lm-evaluation-harness's tasks"),
        ("m_mmlu", "m_mmlu: a group of lm-evaluation-harness's tasks"),
    ],
)  # fmt: skip
def test_other_kinds_say_how_to_run_them(name, problem):
    with pytest.raises(UsageError) as caught:
        harness_task(name)
    assert problem in str(caught.value)


class FakeHub:
    """Stands in for the harness's index: gives a task over records of our own instead of the Hub's."""

    def __init__(self, name: str, docs: list[dict[str, Any]], **changes: Any) -> None:
        self.real, self.changes = harness._task_manager(), changes
        self.name, self.data = name, dict.fromkeys(("train", "validation", "test"), Dataset.from_list(docs))

    @property
    def task_index(self):
        return self.real.task_index

    def load(self, name: str) -> Any:
        spec = {"task": name, "custom_dataset": lambda **_: self.data, **self.changes}
        return self.real.load({"group": "fake", "task": [spec]})


_HELLASWAG = {"ind": 3, "ctx_a": "Er", "ctx_b": "geht", "activity_label": "Gehen", "label": "1",
              "endings": ["heim.", "weg.", "hin.", "her."], "ctx": "Er geht"}  # fmt: skip


@pytest.mark.parametrize("description", ["", "The following are endings.\n\n"])
def test_items_of_another_task(monkeypatch, description):
    hub = FakeHub("hellaswag", [_HELLASWAG, {**_HELLASWAG, "label": "3"}], description=description)
    monkeypatch.setattr(harness, "_task_manager", lambda: hub)
    task = harness_task("hellaswag")
    assert task is not None
    data = task.read(Source())
    assert (data.split, list(data.origin)) == ("validation", ["Rowan/hellaswag"])
    assert [(item.id, item.gold) for item in data.items] == [("1", 1), ("2", 3)]
    assert data.items[0].query == f"{description}Gehen: Er Geht"
    assert data.items[0].choices == ("heim.", "weg.", "hin.", "her.")
    with pytest.raises(UsageError, match="hellaswag: has no split 'test'; allowed: validation"):
        task.read(Source(split="test"))


def test_several_inputs_are_not_scored(monkeypatch):
    doc = {"sentence": "Anna traf Eva, weil _ kam.", "option1": "Anna", "option2": "Eva", "answer": "1"}
    hub = FakeHub("winogrande", [doc])
    monkeypatch.setattr(harness, "_task_manager", lambda: hub)
    task = harness_task("winogrande")
    assert task is not None
    with pytest.raises(UsageError, match="winogrande: a task of several inputs or targets is not scored here"):
        task.read(Source())


def test_a_failed_load_is_one_line(monkeypatch):
    class Broken(FakeHub):
        def load(self, name: str) -> Any:
            raise ConnectionError("no route\nto host")

    hub = Broken("hellaswag", [_HELLASWAG])
    monkeypatch.setattr(harness, "_task_manager", lambda: hub)
    task = harness_task("hellaswag")
    assert task is not None
    with pytest.raises(UsageError, match=r"hellaswag: lm-evaluation-harness cannot load it \(no route to host\)"):
        task.read(Source())


def test_without_the_harness(monkeypatch):
    # The cache is left as it is: building the index takes seconds.
    monkeypatch.setattr(harness, "_task_manager", harness._task_manager.__wrapped__)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UsageError, match=r"hellaswag: needs lm-evaluation-harness .*pip install 'pivotune\[eval\]'"):
        harness_task("hellaswag")
