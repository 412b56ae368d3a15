"""Whole evaluations of tiny models on files written here: chance, copying, interruption, truncation, bad input."""

from __future__ import annotations

import gzip
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chat_templates import LEADS
from conftest import build_tiny_tokenizer
from tiny_training import save_tiny_model

from pivotune.errors import UsageError

pytest.importorskip("lm_eval")

from pivotune.evaluation import run as module
from pivotune.evaluation.cache import Generation, Likelihood, LogProbability
from pivotune.evaluation.engine import Engine
from pivotune.evaluation.prepare import EvaluationSettings
from pivotune.evaluation.run import execute_evaluation, prepare_evaluation

WORDS = ["một", "hai", "ba", "bốn", "năm", "sáu", "bảy", "tám", "chín", "mười"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, max_position_embeddings=1024)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_squad(folder / "xquad.vi.json", "vi", 12)
    write_squad(folder / "xquad.en.json", "en", 12)
    write_xcopa(folder / "test.vi.jsonl", 300)
    for code, texts in (("vie_Latn", WORDS), ("eng_Latn", WORDS[::-1])):
        (folder / f"{code}.devtest").write_text("".join(f"{word} {index}\n" for index, word in enumerate(texts)))
    return folder


def write_squad(path: Path, language: str, count: int, *, passage: str = "Có năm con mèo.") -> None:
    questions = [
        {
            "id": f"{language}{index}",
            "question": f"Câu {index}?",
            "answers": [{"text": WORDS[index % 10], "answer_start": 0}],
        }
        for index in range(count)
    ]
    article = {"title": "t", "paragraphs": [{"context": passage, "qas": questions}]}
    path.write_text(json.dumps({"version": "1.1", "data": [article]}), encoding="utf-8")


def write_xcopa(path: Path, count: int) -> None:
    draw = random.Random(0)
    rows = [
        {
            "premise": f"Có {WORDS[index % 10]} con mèo số {index}.",
            "choice1": f"Chúng {draw.choice(WORDS)}.",
            "choice2": f"Nó {draw.choice(WORDS)}.",
            "question": draw.choice(["cause", "effect"]),
            "label": draw.randrange(2),
            "idx": index,
            "changed": False,
        }
        for index in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def evaluate(model, tasks, out: Path, *, languages=(), **settings):
    prepared = prepare_evaluation(model, tasks, EvaluationSettings(**settings), languages)
    return execute_evaluation(prepared, out)


def items(out: Path) -> list[dict]:
    with gzip.open(out / "results.items.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class Copying(Engine):
    """Answer every request with its gold answer."""

    def __init__(self, prepared):
        asked = [item for task in prepared.tasks for item in task.requests]
        self.text = {item.generation: item.item.gold_answer for item in asked if item.generation}
        self.likely = {r for item in asked if item.item.gold is not None for r in [item.likelihoods[item.item.gold]]}

    def batches(self, requests):
        yield list(requests)

    def answer(self, batch):
        return {
            request: self.text[request]
            if isinstance(request, Generation)
            else LogProbability(-1.0 if request in self.likely else -9.0, 1)
            for request in batch
        }


def test_a_model_that_copies_the_gold_answer_scores_100(model, data, tmp_path, monkeypatch):
    settings = EvaluationSettings(data_dir=data)
    prepared = prepare_evaluation(model, ["xquad_vi", "xquad_en", "xcopa_vi", "flores_vi"], settings)
    monkeypatch.setattr(module.Evaluator, "engine", property(lambda self: Copying(prepared)))
    tasks = execute_evaluation(prepared, tmp_path)["tasks"]
    assert tasks["xquad_vi"]["value"] == tasks["xquad_en"]["value"] == 100
    assert tasks["xquad_vi"]["metrics"]["exact_match"]["value"] == 100
    assert tasks["xcopa_vi"]["value"] == 100
    for direction in ("flores_en-vi", "flores_vi-en"):
        assert tasks[direction]["metric"] == "chrf++"
        assert tasks[direction]["value"] == pytest.approx(100)


def test_a_random_model_is_at_chance(model, data, tmp_path):
    result = evaluate(model, ["xcopa_vi"], tmp_path, data_dir=data, template="none")["tasks"]["xcopa_vi"]
    assert result["n"] == 300
    assert abs(result["value"] - 50) < 3 * result["stderr"]
    assert result["stderr"] == pytest.approx(100 * math.sqrt(0.25 / 300), rel=0.05)


def test_xcopa_equals_the_harness_with_and_without_a_template(model, data, tmp_path):
    """The harness runs its own task on the same file, and both must agree on every question."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from pivotune.evaluation.tasks import harness
    from pivotune.models.loading import load_model, load_tokenizer

    overrides = {
        "task": "xcopa_vi",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(data / "test.vi.jsonl")}},
        "validation_split": None,
        "metric_list": [{"metric": metric, "aggregation": "mean"} for metric in ("acc", "acc_norm")],
    }
    for template, is_chat in (("none", False), ("chat", True)):
        lm = HFLM(pretrained=load_model(str(model)), tokenizer=load_tokenizer(str(model)), batch_size=8)
        expected = simple_evaluate(
            lm,
            tasks=[{"group": "own", "task": [overrides]}],
            task_manager=harness._task_manager(),
            apply_chat_template=is_chat,
            bootstrap_iters=0,
        )
        ours = evaluate(model, ["xcopa_vi"], tmp_path / template, data_dir=data, template=template)
        figures, samples = ours["tasks"]["xcopa_vi"]["metrics"], expected["samples"]["xcopa_vi"]
        own = {item["item"]: item for item in items(tmp_path / template)}
        pairs = [(own[str(sample["doc_id"])], sample) for sample in samples]
        assert figures["accuracy"]["value"] / 100 == pytest.approx(expected["results"]["xcopa_vi"]["acc,none"])
        assert [item["correct"] for item, _ in pairs] == [sample["acc"] for _, sample in pairs]
        likelihoods = np.array([item["log_likelihoods"] for item, _ in pairs])
        theirs = np.array([[found for found, _ in sample["filtered_resps"]] for _, sample in pairs])
        if is_chat:
            # The harness counts the template's last line break as a part of every choice.
            np.testing.assert_allclose(np.diff(likelihoods), np.diff(theirs), atol=1e-3)
        else:
            np.testing.assert_allclose(likelihoods, theirs, atol=1e-3)
            assert [item["correct_norm"] for item, _ in pairs] == [sample["acc_norm"] for _, sample in pairs]
            assert figures["acc_norm"]["value"] / 100 == pytest.approx(expected["results"]["xcopa_vi"]["acc_norm,none"])
            assert figures["acc_norm"]["value"] != figures["accuracy"]["value"]


def test_results_hold_what_the_contract_says(model, data, tmp_path):
    results = evaluate(model, ["xquad_vi"], tmp_path, data_dir=data, limit=5, max_new_tokens=6)
    entry = results["tasks"]["xquad_vi"]
    assert {"metric", "value", "stderr", "n", "higher_is_better"} < entry.keys()
    assert (entry["metric"], entry["n"], entry["benchmark"], entry["language"]) == ("f1", 5, "xquad", "vi")
    assert entry["settings"]["limit"] == 5
    assert entry["settings"]["template"] == "chat"
    assert entry["versions"]["lm_eval"]
    assert entry["origin"] == ["xquad.vi.json"]
    assert len(entry["prompt_hash"]) == 16
    records = items(tmp_path)
    assert [record["item"] for record in records] == [f"vi{index}" for index in range(5)]
    gold = entry["metrics"]["nll_per_token"]
    assert gold["value"] == pytest.approx(sum(r["gold_nll"] for r in records) / sum(r["gold_tokens"] for r in records))
    assert {"answer", "answer_characters", "empty", "in_language", "f1", "exact_match"} < records[0].keys()


@pytest.mark.parametrize("template", [None, *LEADS])
def test_gold_likelihood_is_that_of_training(data, tmp_path, template):
    """Equal to the training scorer's number for the same row, without the template's text after the answer."""
    from pivotune.data.examples import Encoder, Example
    from pivotune.data.rows import Row
    from pivotune.data.templates import Turn, load_template
    from pivotune.models.loading import load_model, load_tokenizer
    from pivotune.training.heldout import score_answers

    name = save_tiny_model(tmp_path / "model", max_position_embeddings=1024)
    if template is not None:
        build_tiny_tokenizer(chat_template=LEADS[template][0]).save_pretrained(name)
    evaluate(name, ["xquad_vi"], tmp_path / "out", data_dir=data, limit=1, max_new_tokens=4)
    tokenizer = load_tokenizer(name)
    encoder = Encoder(tokenizer, load_template("chat", tokenizer))
    query = "Bối cảnh: Có năm con mèo.\n\nCâu hỏi: Câu 0?\n\nTrả lời:"
    side = encoder.encode([Row(query, "một", "", "")])[0].target
    # The words that a template always writes (an empty thinking block) are no part of the answer's likelihood.
    fixed = tokenizer(LEADS[template][1] if template else "", add_special_tokens=False)["input_ids"]
    assert side.ids[: side.answer].tolist() == encoder.encode_prompt(Turn(query))
    rendered = encoder.template.render(Turn(query, "một"))
    up_to_answer = rendered.prompt + rendered.completion[: rendered.completion.index("một") + len("một")]
    length = len(tokenizer(up_to_answer, add_special_tokens=False)["input_ids"])
    answer = replace(side, ids=side.ids[:length], answer=side.answer + len(fixed))
    (expected,) = score_answers(load_model(name), [Example(answer)], pad_token_id=tokenizer.pad_token_id)
    (record,) = items(tmp_path / "out")
    assert record["gold_nll"] == pytest.approx(expected.nll, rel=1e-5)
    assert record["gold_tokens"] == expected.tokens


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(model, data, tmp_path, monkeypatch):
    settings = {"data_dir": data, "batch_size": 4, "max_new_tokens": 6}
    evaluate(model, ["xquad_vi", "xcopa_vi"], tmp_path / "whole", cache=None, **settings)
    answered: list[int] = []
    whole = Engine.answer

    def dying(self, batch):
        if len(answered) == 4:
            raise KeyboardInterrupt
        answered.append(len(batch))
        return whole(self, batch)

    monkeypatch.setattr(Engine, "answer", dying)
    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, ["xquad_vi", "xcopa_vi"], tmp_path / "parts", cache=cache, **settings)
    kept = sum(answered)
    asked: list[int] = []
    monkeypatch.setattr(Engine, "answer", lambda self, batch: asked.append(len(batch)) or whole(self, batch))
    evaluate(model, ["xquad_vi", "xcopa_vi"], tmp_path / "parts", cache=cache, **settings)
    assert kept == 16
    assert sum(asked) == total_requests(model, data) - kept
    assert items(tmp_path / "parts") == items(tmp_path / "whole")
    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "parts"))
    assert first == second
    asked.clear()
    evaluate(model, ["xquad_vi", "xcopa_vi"], tmp_path / "again", cache=cache, **settings)
    assert not asked


def total_requests(model, data) -> int:
    prepared = prepare_evaluation(model, ["xquad_vi", "xcopa_vi"], EvaluationSettings(data_dir=data, max_new_tokens=6))
    return sum(len({request for asked in task.requests for request in asked.all}) for task in prepared.tasks)


def test_cached_answers_need_no_weights(model, data, tmp_path, monkeypatch):
    settings = {"data_dir": data, "limit": 3, "max_new_tokens": 4, "cache": tmp_path / "cache"}
    evaluate(model, ["xquad_vi"], tmp_path / "a", **settings)
    monkeypatch.setattr(module, "load_model", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    evaluate(model, ["xquad_vi"], tmp_path / "b", **settings)
    assert items(tmp_path / "a") == items(tmp_path / "b")


def test_changed_weights_are_asked_anew(model, data, tmp_path):
    settings = {"data_dir": data, "limit": 3, "max_new_tokens": 4, "cache": tmp_path / "cache"}
    evaluate(model, ["xquad_vi"], tmp_path / "a", **settings)
    other = tmp_path / "model"
    save_tiny_model(other, seed=1, max_position_embeddings=1024)
    evaluate(other, ["xquad_vi"], tmp_path / "b", **settings)
    assert [i["gold_nll"] for i in items(tmp_path / "a")] != [i["gold_nll"] for i in items(tmp_path / "b")]


def test_from_python_without_a_file(model, data, tmp_path, monkeypatch):
    from pivotune import evaluate_model

    monkeypatch.chdir(tmp_path)
    settings = {"data_dir": data, "limit": 3, "max_new_tokens": 4}
    results = evaluate_model(model, ["xquad_vi", "xquad_en"], **settings)
    assert set(results["tasks"]) == {"xquad_vi", "xquad_en"}
    assert not list(tmp_path.iterdir())
    written = evaluate_model(model, ["xquad_vi", "xquad_en"], out=tmp_path / "out", **settings)
    assert written == results


def test_tasks_already_there_stay(model, data, tmp_path):
    evaluate(model, ["xquad_vi"], tmp_path, data_dir=data, limit=3, max_new_tokens=4)
    results = evaluate(model, ["xquad_en"], tmp_path, data_dir=data, limit=2, max_new_tokens=4)
    assert set(results["tasks"]) == {"xquad_vi", "xquad_en"}
    assert [record["task"] for record in items(tmp_path)].count("xquad_vi") == 3
    evaluate(model, ["xquad_vi"], tmp_path, data_dir=data, limit=5, max_new_tokens=4)
    assert [record["task"] for record in items(tmp_path)].count("xquad_vi") == 5


def test_a_seed_draws_a_sample_that_a_larger_limit_contains(model, data):
    def drawn(**settings):
        prepared = prepare_evaluation(model, ["xcopa_vi"], EvaluationSettings(data_dir=data, **settings))
        return [asked.item.id for asked in prepared.tasks[0].requests]

    assert drawn(limit=5) == ["0", "1", "2", "3", "4"]
    small, large, other = drawn(limit=10, seed=0), drawn(limit=40, seed=0), drawn(limit=10, seed=1)
    assert set(small) < set(large)
    assert small not in (other, drawn(limit=10))


def test_a_prompt_longer_than_the_model_is_cut_and_counted(tmp_path):
    folder = tmp_path / "model"
    save_tiny_model(folder, max_position_embeddings=128)
    write_squad(tmp_path / "xquad.vi.json", "vi", 3, passage="Có năm con mèo. " * 40)
    result = evaluate(folder, ["xquad_vi"], tmp_path / "out", data_dir=tmp_path, max_new_tokens=8)
    assert result["tasks"]["xquad_vi"]["truncated"] == 3
    assert all(record["truncated"] for record in items(tmp_path / "out"))


def test_sentences_longer_than_the_model_are_cut_and_counted(tmp_path):
    """XNLI scores whole sentences without a prompt, so only the sentences can be cut."""
    name = save_tiny_model(tmp_path / "model", max_position_embeddings=64)
    long, short = "Có năm con mèo rất to. " * 20, "Có mèo."
    rows = [f"{long}\t{short}\tneutral\n", f"{short}\tMèo.\tentailment\n"]
    (tmp_path / "dev-vi.tsv").write_text("".join(rows), encoding="utf-8")
    result = evaluate(name, ["xnli_vi"], tmp_path / "out", data_dir=tmp_path, template="none")
    assert result["tasks"]["xnli_vi"]["truncated"] == 1
    assert [record.get("truncated", False) for record in items(tmp_path / "out")] == [True, False]


def test_a_prompt_that_cannot_fit_names_task_and_item(data, tmp_path):
    name = save_tiny_model(tmp_path / "model", max_position_embeddings=48)
    with pytest.raises(UsageError, match=r"flores_en-vi, item \S+: the prompt takes \d+ tokens .* the model reads 48"):
        prepare_evaluation(name, ["flores_vi"], EvaluationSettings(data_dir=data, max_new_tokens=16))


def test_an_empty_answer_counts_as_wrong(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "_generate", lambda self, requests: dict.fromkeys(requests, "  "))
    entry = evaluate(model, ["xquad_vi"], tmp_path, data_dir=data)["tasks"]["xquad_vi"]
    assert entry["value"] == 0
    assert entry["metrics"]["empty_answers"]["value"] == 100
    assert "in_language" not in entry["metrics"]


def test_alignment_is_measured_kept_and_written(model, data, tmp_path, monkeypatch):
    settings = {"data_dir": data, "cache": tmp_path / "cache"}
    first = evaluate(model, ["alignment_vi"], tmp_path / "a", **settings)["tasks"]
    monkeypatch.setattr(module, "load_model", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    again = evaluate(model, ["alignment_vi"], tmp_path / "b", **settings)["tasks"]
    (entry,) = first.values()
    assert entry == next(iter(again.values()))
    assert entry["metric"] == "retrieval_accuracy"
    assert len(entry["by_layer"]["retrieval_accuracy"]) == 5


@pytest.mark.parametrize(
    ("tasks", "settings", "message"),
    [
        (["xquad_de"], {}, "xquad_de: no xquad.de.json below"),
        (["xquad_vi", "mlqa_vi", "xnli_vi"], {}, "2 of 3 tasks have no data"),
        (["xcopa_de"], {}, "XCOPA has no language 'de'"),
        (["xqad_vi"], {}, "no task 'xqad_vi'; near: xquad_vi"),
        (["xquad"], {}, "xquad needs a language"),
        ([], {}, "--tasks: none given"),
        (["xquad_vi"], {"split": "train"}, "split 'train'"),
        (["xquad_vi"], {"template": "missing.jinja"}, "missing.jinja"),
        (["xquad_vi"], {"limit": 0}, "--limit: 0 found"),
        (["xquad_vi"], {"backend": "tgi"}, "--backend: 'tgi' found; allowed: hf, vllm"),
        (["xquad_vi"], {"backend": "vllm"}, "--backend: vllm is not installed"),
        (["flores_vi-zh"], {}, "no task flores_vi-zh; allowed: flores_en-vi, flores_vi-en"),
    ],
)
def test_bad_input_is_one_line_before_weights(model, data, tasks, settings, message, monkeypatch):
    monkeypatch.setattr(module, "load_model", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError, match=message.replace("(", r"\(")) as caught:
        prepare_evaluation(model, tasks, EvaluationSettings(**{"data_dir": data, **settings}))
    assert "\n" not in str(caught.value)


def test_missing_sets_may_be_left_out(model, data, tmp_path):
    settings = EvaluationSettings(data_dir=data, skip_missing=True, limit=2, max_new_tokens=4)
    prepared = prepare_evaluation(model, ["qa_vi"], settings)
    assert [task.task.name for task in prepared.tasks] == ["xquad_vi", "xquad_en"]
    assert len(prepared.missing) == 4
    assert set(execute_evaluation(prepared, tmp_path)["tasks"]) == {"xquad_vi", "xquad_en"}


def test_likelihood_requests_of_choices_share_their_prompt(model, data):
    prepared = prepare_evaluation(model, ["xcopa_vi"], EvaluationSettings(data_dir=data, limit=1))
    first, second = prepared.tasks[0].requests[0].likelihoods
    assert isinstance(first, Likelihood)
    assert first.context == second.context
    assert first.continuation != second.continuation


def test_vllm_is_not_given_adapters_alone(tmp_path, monkeypatch):
    """A quantized run saves adapters that are not merged; vLLM would fail after its start."""
    save_tiny_model(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    settings = {"base_model_name_or_path": str(tmp_path / "base"), "peft_type": "LORA"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    monkeypatch.setattr("pivotune.evaluation.prepare.find_spec", lambda name: object())
    with pytest.raises(UsageError, match=r"--backend: vllm reads whole models, and .*adapter holds adapters alone"):
        prepare_evaluation(tmp_path / "adapter", ["xquad_vi"], EvaluationSettings(backend="vllm"))
