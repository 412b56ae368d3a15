"""Answers of two parts: the English part is generated first, and the task's own requests follow it."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_files import write_file
from conftest import build_tiny_model, build_tiny_tokenizer
from tiny_training import save_tiny_model

from pivotune.data.templates import load_template
from pivotune.errors import UsageError

pytest.importorskip("lm_eval")

from pivotune.evaluation import run as module
from pivotune.evaluation.cache import Generation, Likelihood, LogProbability, Pivot
from pivotune.evaluation.engine import Engine, transformers_engine
from pivotune.evaluation.prepare import EvaluationSettings, prepare_evaluation
from pivotune.evaluation.prompts import Prompter, item_requests
from pivotune.evaluation.run import execute_evaluation
from pivotune.evaluation.tasks.base import ACCURACY, Item, Task

MARKER = "\n\n[Vietnamese]\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for language in ("vi", "en"):
        questions = [
            {"id": f"{language}{n}", "question": f"Câu {n}?", "answers": [{"text": "một", "answer_start": 0}]}
            for n in range(8)
        ]
        article = {"title": "t", "paragraphs": [{"context": "Có năm con mèo.", "qas": questions}]}
        write_file(folder / f"xquad.{language}.json", {"version": "1.1", "data": [article]})
    choices = {"choice1": "Chúng đi.", "choice2": "Nó ngủ.", "question": "cause", "changed": False}
    rows = [{"premise": f"Mèo {n}.", **choices, "label": n % 2, "idx": n} for n in range(8)]
    write_file(folder / "test.vi.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_file(folder / "vie_Latn.devtest", "một\nhai\nba\nbốn\n")
    write_file(folder / "eng_Latn.devtest", "one\ntwo\nthree\nfour\n")
    return folder


def items(out: Path) -> list[dict]:
    with gzip.open(out / "results.items.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def evaluate(model, tasks, out, **settings):
    return execute_evaluation(prepare_evaluation(model, tasks, EvaluationSettings(**settings)), out)["tasks"]


class Answering(Engine):
    """Write an English part, with a marker for every second item, and remember all requests in order."""

    asked: list = []  # noqa: RUF012

    def __init__(self) -> None:
        pass

    def batches(self, requests):
        yield list(requests)

    def answer(self, batch):
        self.asked.extend(batch)
        found = {}
        for number, request in enumerate(batch):
            english = f"Part {number}." + ("\n\n[Vietnamese]" if number % 2 == 0 else " \n")
            found[request] = LogProbability(-1.0, 1) if isinstance(request, Likelihood) else english
        return found


def test_requests_follow_the_models_own_english_part(model, data, tmp_path, monkeypatch):
    Answering.asked.clear()
    monkeypatch.setattr(module.Evaluator, "engine", property(lambda self: Answering()))
    tasks = ["xquad_vi", "xcopa_vi", "xquad_en", "flores_vi"]
    entries = evaluate(model, tasks, tmp_path, data_dir=data, limit=4, pivot="plug")
    first = [request for request in Answering.asked if isinstance(request, Pivot)]
    assert len(first) == 8
    assert {request.stop for request in first} == {("[Vietnamese]",)}
    assert {request.max_new_tokens for request in first} == {256}
    assert Answering.asked[:4] == first[:4], "English parts come first"
    # A part that ended without the marker gets one.
    contexts = [f"{request.context}Part {number}.{MARKER}" for number, request in enumerate(first[:4])]
    rest = Answering.asked[4:12]
    assert [request.context for request in rest] == [context for context in contexts for _ in range(2)]
    assert [type(request) for request in rest[:2]] == [Likelihood, Generation]
    assert rest[1].stop == ("\n",), "the task's own"
    shown = {name: entries[name]["metrics"].get("no_marker", {}).get("value") for name in entries}
    # Tasks in English and translation have no pivot.
    assert shown == {"xquad_vi": 50, "xcopa_vi": 50, "xquad_en": None, "flores_en-vi": None, "flores_vi-en": None}
    pivots = {name: entry["settings"]["pivot"] for name, entry in entries.items()}
    assert pivots == {name: "none" if shown[name] is None else "plug" for name in shown}
    record = items(tmp_path)[0]
    assert (record["english_part"], record["no_marker"]) == ("Part 0.\n\n[Vietnamese]", 0)


def test_the_method_of_a_run_decides_unless_an_option_does(data, tmp_path):
    save_tiny_model(tmp_path / "run" / "model", max_position_embeddings=1024)
    for method, option, expected in (
        ("plug", None, "plug"),
        ("plug", "none", "none"),
        ("tft", None, "none"),
        ("tft", "plug", "plug"),
    ):
        config = {"model": "m", "method": method, "data": {"train": "x.jsonl", "language": "vi"}, "output_dir": "run"}
        (tmp_path / "run" / "config.yaml").write_text(json.dumps(config))
        prepared = prepare_evaluation(
            tmp_path / "run", ["xquad_vi"], EvaluationSettings(data_dir=data, pivot=option, limit=1)
        )
        assert prepared.pivot == expected
        assert (prepared.tasks[0].marker == MARKER) == (expected == "plug")
    with pytest.raises(UsageError, match="--pivot: 'tft' found; allowed: none, plug"):
        prepare_evaluation(tmp_path / "run", ["xquad_vi"], EvaluationSettings(data_dir=data, pivot="tft"))


def test_gold_likelihood_is_that_of_training_behind_the_english_part(data, tmp_path, monkeypatch):
    """Equal to the training scorer's number for the last part of the row that `method: plug` trains."""
    from pivotune.data.examples import Encoder, Example
    from pivotune.data.rows import Row
    from pivotune.models.loading import load_model, load_tokenizer
    from pivotune.training.heldout import score_answers

    name = save_tiny_model(tmp_path / "model", max_position_embeddings=1024)
    whole = Engine.answer

    def answer(self, batch):
        if isinstance(batch[0], Pivot):
            return dict.fromkeys(batch, "It is one.\n\n[Vietnamese]")
        return whole(self, batch)

    monkeypatch.setattr(Engine, "answer", answer)
    evaluate(name, ["xquad_vi"], tmp_path / "out", data_dir=data, limit=1, max_new_tokens=4, pivot="plug")
    tokenizer = load_tokenizer(name)
    encoder = Encoder(tokenizer, load_template("chat", tokenizer))
    query = "Bối cảnh: Có năm con mèo.\n\nCâu hỏi: Câu 0?\n\nTrả lời:"
    side = encoder.encode([Row(query, f"It is one.{MARKER}một", "", "")])[0].target
    tail = tokenizer("một", add_special_tokens=False)["input_ids"]
    ids = side.ids[:-1]  # the end token is no part of a gold answer
    assert ids[-len(tail) :].tolist() == tail
    last = replace(side, ids=ids, answer=len(ids) - len(tail))
    (expected,) = score_answers(load_model(name), [Example(last)], pad_token_id=tokenizer.pad_token_id)
    (record,) = items(tmp_path / "out")
    assert record["gold_nll"] == pytest.approx(expected.nll, rel=1e-5)
    assert record["gold_tokens"] == len(tail)


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(model, data, tmp_path, monkeypatch):
    settings = {"data_dir": data, "batch_size": 3, "max_new_tokens": 6, "limit": 8, "pivot": "plug"}
    evaluate(model, ["xquad_vi", "xcopa_vi"], tmp_path / "whole", **settings)
    whole, count = Engine.answer, []

    def dying(self, batch):
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(batch)
        return whole(self, batch)

    settings["cache"] = tmp_path / "cache"
    for _ in range(3):  # in the English parts, in the answers, and in the second task
        count.clear()
        monkeypatch.setattr(Engine, "answer", dying)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, ["xquad_vi", "xcopa_vi"], tmp_path / "cut", **settings)
    monkeypatch.setattr(Engine, "answer", whole)
    evaluate(model, ["xquad_vi", "xcopa_vi"], tmp_path / "cut", **settings)
    assert items(tmp_path / "cut") == items(tmp_path / "whole")
    monkeypatch.setattr(module, "load_model", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    evaluate(model, ["xquad_vi", "xcopa_vi"], tmp_path / "again", **settings)
    assert items(tmp_path / "again") == items(tmp_path / "whole")
    assert all("english_part" in record for record in items(tmp_path / "whole"))


def test_the_engine_keeps_the_marker_where_it_is_reached():
    tokenizer = build_tiny_tokenizer()
    engine = transformers_engine(
        build_tiny_model(), Prompter(tokenizer, None, 256), batch_size=2, end_token_ids=[tokenizer.eos_token_id]
    )
    (text,) = engine.answer([Generation("the cat", 12, ())]).values()
    stop = text[3:6]
    end = text.index(stop)
    assert list(engine.answer([Pivot("the cat", 12, (stop,))]).values()) == [text[: end + 3]]
    assert list(engine.answer([Generation("the cat", 12, (stop,))]).values()) == [text[:end]]
    assert list(engine.answer([Pivot("the cat", 12, ("never",))]).values()) == [text]


def test_a_prompt_leaves_room_for_both_parts_and_an_empty_one_has_no_pivot():
    tokenizer = build_tiny_tokenizer()
    prompter = Prompter(tokenizer, load_template("chat", tokenizer), 128)
    task = Task("own_vi", "own", "vi", "choice", (ACCURACY,), lambda source: pytest.fail("no data"))
    item = Item("1", "Namba 1 ni ipi? " * 12, choices=("moja", "mbili"), gold=0)
    plain, pivoted = (item_requests(task, item, prompter, 40, marker) for marker in ("", MARKER))
    assert pivoted.pivot is not None
    assert pivoted.pivot.max_new_tokens == 40
    room = 40 + len(prompter.encode_pair("\n", MARKER)[1]) + len(prompter.encode_pair("\n", "mbili")[1])
    assert len(prompter.encode_context(pivoted.pivot.context)) <= 128 - room
    assert len(plain.context.text) > len(pivoted.context.text)
    assert pivoted.context.truncated
    assert item_requests(task, replace(item, query=""), prompter, 40, MARKER).pivot is None


def test_control_tokens_of_the_english_part_are_text():
    """A model that spells out `<|end|>` in its English part does not end the turn."""
    tokenizer = build_tiny_tokenizer()
    prompter = Prompter(tokenizer, load_template("chat", tokenizer), 256)
    task = Task("own_vi", "own", "vi", "choice", (ACCURACY,), lambda source: pytest.fail("no data"))
    asked = item_requests(task, Item("1", "Moja?", choices=("a",), gold=0), prompter, 8, MARKER)
    behind = asked.behind(prompter.as_text("one <|end|> two\n\n[Vietnamese]"))
    ids = prompter.encode_context(behind.likelihoods[0].context)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert ids.count(end) == 1, "that of the question"
    assert tokenizer.decode(ids).endswith(f"one <|end|> two{MARKER}")
