from __future__ import annotations

import gzip
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_rows
from process_pool import Process
from safetensors.torch import load_file
from tiny_training import QUIET, assert_same, run_config, run_settings, save_tiny_model, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import TrainerState

from pivotune.config.registry import METHODS
from pivotune.config.yaml_text import parse_config
from pivotune.data.datasets import training_examples
from pivotune.data.examples import Side
from pivotune.data.pair_store import store_pairs
from pivotune.errors import UsageError
from pivotune.layers.layers_json import read_layers_json
from pivotune.results.files import read_metrics
from pivotune.runs import execute as run_module
from pivotune.runs.execute import execute_run
from pivotune.runs.prepare import prepare_run

TRAINING = {**QUIET, "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}


@pytest.fixture
def no_weights(monkeypatch) -> None:
    """Fail the test where weights are loaded before the mistake is found."""

    def load_model(*args: Any, **options: Any) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr(run_module, "load_model", load_model)


def mistake(folder: Path, **changes: Any) -> str:
    with pytest.raises(UsageError) as raised:
        prepare_run(run_config(folder, **changes))
    assert "\n" not in str(raised.value)
    assert not (folder / "run").exists()
    return str(raised.value)


def go(folder: Path, **changes: Any):
    return execute_run(prepare_run(run_config(folder, **changes)))


def data(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**run_settings(folder)["data"], **changes}


def answer_nll(model: Any, side: Side) -> float:
    ids = side.ids.tolist()
    with torch.no_grad():
        log_probabilities = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)
    return -sum(log_probabilities[at - 1, ids[at]].item() for at in range(side.answer, len(ids)))


# ---- mistakes, before a weight is loaded ----


@pytest.mark.usefixtures("no_weights")
class TestMistakes:
    def test_missing_data(self, tmp_path):
        message = mistake(tmp_path, data={"train": str(tmp_path / "rowz.jsonl")})
        assert str(tmp_path / "rowz.jsonl") in message
        assert "no such file" in message

    def test_empty_data(self, tmp_path):
        (tmp_path / "empty.jsonl").write_text("")
        message = mistake(tmp_path, data={"train": str(tmp_path / "empty.jsonl")})
        assert str(tmp_path / "empty.jsonl") in message
        assert "empty" in message or "no rows" in message

    def test_broken_line(self, tmp_path):
        path = Path(write_rows(tmp_path / "broken.jsonl", 3))
        path.write_text(path.read_text() + '{"prompt": "x", \n')
        assert "line 4" in mistake(tmp_path, data={"train": str(path)})

    def test_row_without_english(self, tmp_path):
        rows = tiny_rows(8)
        rows[4]["completion_en"] = ""
        message = mistake(tmp_path, data={"train": write_rows(tmp_path / "some.jsonl", rows)})
        assert "some.jsonl, line 5" in message
        assert "completion_en" in message

    def test_rows_that_do_not_fit(self, tmp_path):
        message = mistake(tmp_path, data=data(tmp_path, max_prompt_tokens=4))
        assert "rows.jsonl: line " in message
        assert "data.max_prompt_tokens" in message

    def test_no_row_is_left(self, tmp_path):
        """The reason is counted once, however long each row's template is."""
        message = mistake(tmp_path, data=data(tmp_path, max_prompt_tokens=4, on_bad_row="skip"))
        assert "no row is left to train on" in message
        assert "(16 rows: the template alone takes more than the 4 tokens of data.max_prompt_tokens" in message

    def test_branch_that_does_not_fit(self, tmp_path):
        save_tiny_model(tmp_path / "short", max_position_embeddings=64)
        rows = [{"prompt": "a " * 15, "completion": "b", "prompt_en": "c d " * 10, "completion_en": "e"}] * 8
        settings = {"train": write_rows(tmp_path / "long.jsonl", rows), "validation": 0, "english_ratio": 0.0}
        message = mistake(tmp_path, model=str(tmp_path / "short"), data=settings)
        assert "tokens together and the model reads 64" in message

    @pytest.mark.parametrize(
        ("layers", "words"),
        [
            ((1, 4), ("supervision.thinking.layer: 4", "choose 1 to 3")),
            ((1, 9), ("supervision.thinking.layer: 9",)),
        ],
    )
    def test_layers(self, tmp_path, layers, words):
        supervision = {"conversion": {"layer": layers[0]}, "thinking": {"layer": layers[1]}}
        message = mistake(tmp_path, supervision=supervision)
        assert all(word in message for word in words)

    @pytest.mark.parametrize("layers", [(0, 2), (3, 2), (2, 2)])
    def test_layers_wrong_in_any_model(self, tmp_path, layers):
        with pytest.raises(UsageError, match=r"supervision\.conversion\.layer"):
            run_config(tmp_path, supervision={"conversion": {"layer": layers[0]}, "thinking": {"layer": layers[1]}})

    def test_no_signal(self, tmp_path):
        off = {"signal": "none"}
        assert "that is method: tft" in mistake(tmp_path, supervision={"conversion": off, "thinking": off})

    def test_unknown_training_key(self, tmp_path):
        message = mistake(tmp_path, training={**TRAINING, "lerning_rate": 1e-4})
        assert "unknown key training.lerning_rate; did you mean training.learning_rate?" in message

    def test_model_without_weights(self, tmp_path):
        run_settings(tmp_path)
        (tmp_path / "base" / "model.safetensors").unlink()
        assert f"{tmp_path / 'base'}: no weights" in mistake(tmp_path)

    def test_unknown_family(self, tmp_path):
        run_settings(tmp_path)
        path = tmp_path / "base" / "config.json"
        config = {**json.loads(path.read_text()), "model_type": "opt", "architectures": ["OPTForCausalLM"]}
        path.write_text(json.dumps(config))
        assert "model type 'opt' is not supported" in mistake(tmp_path)

    def test_tokenizer_without_end_of_text(self, tmp_path):
        run_settings(tmp_path)
        path = tmp_path / "base" / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in settings.items() if key != "eos_token"}))
        assert "no end-of-text token" in mistake(tmp_path)

    @pytest.mark.parametrize("count", [20, 21, 500])
    def test_validation_larger_than_the_data(self, tmp_path, count):
        message = mistake(tmp_path, data=data(tmp_path, validation=count))
        assert f"data.validation: {count} rows asked for, the data has 20" in message

    def test_evaluation_without_held_out_rows(self, tmp_path):
        training = {**TRAINING, "eval_strategy": "steps", "eval_steps": 2}
        message = mistake(tmp_path, data=data(tmp_path, validation=0), training=training)
        assert "training.eval_strategy: steps needs held-out rows" in message

    def test_template_without_answer(self, tmp_path):
        (tmp_path / "template.jinja").write_text("Q: {{ prompt }}\nA:")
        message = mistake(tmp_path, data=data(tmp_path, template=str(tmp_path / "template.jinja")))
        assert "template.jinja" in message
        assert "completion" in message

    @pytest.mark.parametrize("target", [["lm_head"], ".*lm_head", ["nothing_like_it"]])
    def test_adapters(self, tmp_path, target):
        save_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
        message = mistake(tmp_path, model=str(tmp_path / "tied"), lora={"target_modules": target})
        assert message.startswith("lora.target_modules: ")

    def test_folder_of_another_run(self, tmp_path):
        config = run_config(tmp_path)
        run_module.write_run_config(tmp_path / "run", config)
        (tmp_path / "run" / "checkpoint-2").mkdir()
        with pytest.raises(UsageError, match="already holds a run; add --resume to go on with it or --overwrite"):
            prepare_run(config)

    @pytest.mark.parametrize("model", ["run", "run/model", "run/checkpoint-4"])
    def test_starting_model_inside_the_folder_that_is_replaced(self, tmp_path, model):
        """`--overwrite` must not delete the model to start from."""
        config = run_config(tmp_path)
        run_module.write_run_config(tmp_path / "run", config)
        for name in ("model", "checkpoint-4"):
            save_tiny_model(tmp_path / "run" / name)
        with pytest.raises(UsageError, match=r"output_dir: .* holds the model to start from"):
            prepare_run(run_config(tmp_path, model=str(tmp_path / model)), overwrite=True)
        assert (tmp_path / "run" / "model" / "model.safetensors").is_file()

    def test_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("x")
        prepared = prepare_run(run_config(tmp_path, output_dir=str(tmp_path / "file" / "run")))
        with pytest.raises(UsageError, match=r"output_dir: .*file/run cannot be written \(Not a directory\)"):
            execute_run(prepared)

    def test_nothing_is_written_by_preparing(self, tmp_path):
        prepare_run(run_config(tmp_path))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "rows.jsonl"]


# ---- rows ----


@pytest.mark.parametrize(("validation", "held"), [(4, 4), (0, 0), (0.3, 6), (0.01, 1), (0.0, 0)])
def test_validation_by_count_or_share(tmp_path, validation, held):
    prepared = prepare_run(run_config(tmp_path, data=data(tmp_path, validation=validation)))
    assert (len(prepared.validation), len(prepared.train)) == (held, 20 - held)
    numbers = {pair.number for pair in prepared.train} | {pair.number for pair in prepared.validation}
    assert numbers == set(range(1, 21))


def test_validation_by_file_may_lack_english(tmp_path):
    rows = [{key: row[key] for key in ("prompt", "completion")} for row in tiny_rows(30)[20:]]
    settings = data(tmp_path, validation=write_rows(tmp_path / "held.jsonl", rows), limit=7)
    prepared = prepare_run(run_config(tmp_path, data=settings))
    # The limit is for training rows.
    assert (len(prepared.train), len(prepared.validation)) == (7, 10)
    assert all(pair.english is None for pair in prepared.validation)
    result = execute_run(prepared)
    assert set(result.results["tasks"]) == {"heldout_sw"}


def test_limit_comes_before_the_split(tmp_path):
    prepared = prepare_run(run_config(tmp_path, data=data(tmp_path, limit=8, validation=2)))
    assert {pair.number for pair in [*prepared.train, *prepared.validation]} == set(range(1, 9))
    assert len(prepared.validation) == 2


def test_english_beside_the_target_file(tmp_path):
    rows = tiny_rows(10)
    target = write_rows(tmp_path / "sw.jsonl", [{k: row[k] for k in ("id", "prompt", "completion")} for row in rows])
    english = write_rows(
        tmp_path / "en.jsonl",
        [{"id": row["id"], "prompt": row["prompt_en"], "completion": row["completion_en"]} for row in reversed(rows)],
    )
    apart = prepare_run(run_config(tmp_path, data={"train": target, "english": english, "validation": 0}))
    joined = prepare_run(
        run_config(tmp_path, data={"train": write_rows(tmp_path / "both.jsonl", rows), "validation": 0})
    )
    for one, other in zip(apart.train, joined.train, strict=True):
        assert one.english.ids.tolist() == other.english.ids.tolist()


# ---- a whole run ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run with checkpoints and evaluation on the way, shared by the tests that only read it."""
    folder = tmp_path_factory.mktemp("finished")
    training = {**TRAINING, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    prepared = prepare_run(run_config(folder, training=training))
    return prepared, execute_run(prepared)


def test_run_folder_is_complete(finished):
    _, result = finished
    assert sorted(path.name for path in result.folder.iterdir()) == [
        ".lock", "README.md", "checkpoint-2", "checkpoint-4", "config.yaml", "environment.json", "layers.json",
        "metrics.jsonl", "model", "results.items.jsonl.gz", "results.json", "rows.json", "start-scores.json",
    ]  # fmt: skip
    names = {path.name for path in (result.folder / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not any(path.suffix in (".bin", ".pt", ".pth", ".pkl") for path in (result.folder / "model").iterdir())


def test_saved_model_is_a_plain_folder(finished):
    _, result = finished
    model = AutoModelForCausalLM.from_pretrained(result.folder / "model", attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(result.folder / "model")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Namba 3 ni ipi?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > ids["input_ids"].shape[1]
    with torch.no_grad():
        torch.testing.assert_close(model(**ids).logits, result.model.eval()(**ids).logits, rtol=0, atol=1e-5)


def test_results_equal_an_independent_computation(finished):
    prepared, result = finished
    written = json.loads((result.folder / "results.json").read_text(encoding="utf-8"))
    assert written == result.results
    assert set(written["tasks"]) == {"heldout_sw", "heldout_en"}
    trained = AutoModelForCausalLM.from_pretrained(result.folder / "model")
    base = AutoModelForCausalLM.from_pretrained(prepared.config.model)
    for name, side in (("heldout_sw", "target"), ("heldout_en", "english")):
        sides = [getattr(pair, side) for pair in prepared.validation]
        tokens, characters = sum(s.num_answer_tokens for s in sides), sum(s.characters for s in sides)
        after, before = (sum(answer_nll(model, s) for s in sides) for model in (trained, base))
        task = written["tasks"][name]
        assert (task["metric"], task["n"], task["higher_is_better"]) == ("nll", 4, False)
        assert task["value"] == pytest.approx(after / tokens, rel=1e-5)
        facts = ("heldout", "sw" if side == "target" else "en", "validation")
        assert (task["benchmark"], task["language"], task["split"]) == facts
        figure = {key: task[key] for key in ("value", "stderr", "n", "higher_is_better")}
        assert task["metrics"] == {"nll": {**figure, "form": "ratio", "fields": ["nll", "tokens"], "scale": 1.0}}
        assert task["nll_per_character"] == pytest.approx(after / characters, rel=1e-5)
        assert task["base"]["value"] == pytest.approx(before / tokens, rel=1e-5)
        assert task["base"]["nll_per_character"] == pytest.approx(before / characters, rel=1e-5)
        assert task["value"] < task["base"]["value"]


def test_items_add_up_to_the_results(finished):
    prepared, result = finished
    with gzip.open(result.folder / "results.items.jsonl.gz", "rt", encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    for name, task in result.results["tasks"].items():
        mine = [item for item in items if item["task"] == name]
        # The rows' places in their file: another seed holds out others.
        assert [item["item"] for item in mine] == [pair.number for pair in prepared.validation]
        tokens = sum(item["tokens"] for item in mine)
        assert sum(item["nll"] for item in mine) / tokens == pytest.approx(task["value"], rel=1e-9)
        assert sum(item["base_nll"] for item in mine) / tokens == pytest.approx(task["base"]["value"], rel=1e-9)
    assert len(items) == 2 * len(prepared.validation)


def test_metrics_have_every_term(finished):
    _, result = finished
    lines = read_metrics(result.folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    always = {"loss", "tft_loss", "grad_norm", "learning_rate", "supervision_factor", "epoch",
              "target_tokens_per_second", "english_tokens_per_second", "padding_tokens_per_second",
              "padding_share"}  # fmt: skip
    assert all(always <= line.keys() for line in steps)
    # The inner losses are not computed at the last step, where the schedule is 0.
    assert all({"conversion_loss", "thinking_loss"} <= line.keys() for line in steps[:-1])
    assert steps[-1]["supervision_factor"] == 0
    held = [line for line in lines if "eval_target_nll" in line]
    assert [line["step"] for line in held] == [2, 4]
    # The last evaluation on the way is the one that the results report.
    assert held[-1]["eval_target_nll"] == pytest.approx(result.results["tasks"]["heldout_sw"]["value"], rel=1e-5)


def test_results_count_what_was_trained(finished):
    """Four steps of four rows: 16 rows, each once, are one epoch of all rows."""
    prepared, result = finished
    rows = training_examples(prepared.train, METHODS["deep-supervision"], english_ratio=0.25, seed=0)
    answers = sum(example.main.num_answer_tokens for example in rows)
    english = sum(len(example.parallel.ids) for example in rows if example.parallel)
    expected = {"rows": 16, "tokens": int(rows.main_lengths.sum()), "answer_tokens": answers, "english_tokens": english}
    assert result.results["trained"] == expected
    line = (
        f"16 rows in all epochs with {expected['tokens']:,} tokens, {answers:,} of them in answers; {english:,} tokens"
    )
    assert line in (result.folder / "README.md").read_text()


@pytest.mark.parametrize("logging", [{"logging_strategy": "no"}, {"logging_steps": 3}])
def test_counts_do_not_depend_on_the_log(tmp_path, logging):
    training = {**{key: value for key, value in TRAINING.items() if key != "logging_steps"}, **logging}
    assert go(tmp_path, method="tft", training=training).results["trained"]["rows"] == 16


def test_every_method_trains_within_one_token_budget(tmp_path):
    found = {}
    for method in ("tft", "plug", "deep-supervision"):
        changes = {"data": data(tmp_path, token_budget=250), "output_dir": str(tmp_path / method)}
        training = {key: value for key, value in TRAINING.items() if key != "max_steps"} | {"num_train_epochs": 2}
        prepared = prepare_run(run_config(tmp_path, method=method, training=training, **changes))
        note = re.fullmatch(r"data\.token_budget 250: (\d+) rows an epoch with (\d+) tokens", prepared.notes[-1])
        trained = execute_run(prepared).results["trained"]
        assert (trained["rows"], trained["tokens"]) == (2 * int(note[1]), 2 * int(note[2]))
        found[method] = trained
        assert 250 - 90 < int(note[2]) <= 250
    # The same rows; answers of two parts are longer, so that fewer fit.
    assert found["tft"]["rows"] == found["deep-supervision"]["rows"] > found["plug"]["rows"]
    tasks = json.loads((tmp_path / "plug" / "results.json").read_text())["tasks"]
    assert set(tasks) == {"heldout_pivot_sw", "heldout_en"}
    # All rows of English prompt and answer are the same rows as elsewhere.
    assert tasks["heldout_en"]["n"] == 4


@pytest.mark.parametrize("budget", [5, 10_000_000])
def test_a_token_budget_that_rows_cannot_fill_is_refused(tmp_path, budget):
    message = mistake(tmp_path, method="tft", data=data(tmp_path, token_budget=budget))
    assert re.fullmatch(
        rf"data\.token_budget: {budget} tokens an epoch; allowed: \d+ \(the first row drawn\) to \d+ \(all 16 rows\)",
        message,
    )


def test_layers_are_those_trained_with(finished):
    _, result = finished
    layers = read_layers_json(result.folder / "layers.json")
    assert layers == result.layers
    assert 1 <= layers["conversion"] < layers["thinking"] <= 3
    assert layers["model"] == finished[0].config.model
    assert layers["language"] == "sw"
    # 8 rows were asked for, in both languages.
    assert layers["target"]["sequences"] == layers["english"]["sequences"] == 8
    assert layers["reason"]


def test_model_card_has_metadata_and_numbers(finished):
    _, result = finished
    card = (result.folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    task = result.results["tasks"]["heldout_sw"]
    assert rf"| heldout\_sw | 4 | {task['base']['value']:.3f} | {task['value']:.3f} ±" in card
    assert f"Conversion at layer {result.layers['conversion']}" in card


def test_named_layers_are_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "measure_layers", lambda *args, **kwargs: pytest.fail("measured"))
    result = go(tmp_path, supervision={"conversion": {"layer": 2}, "thinking": {"layer": 3}})
    assert result.layers is None
    assert not (tmp_path / "run" / "layers.json").exists()
    assert "Conversion at layer 2, thinking at layer 3" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("method", ["tft", "sft"])
def test_baselines(tmp_path, method):
    result = go(tmp_path, method=method)
    assert result.layers is None
    assert not (tmp_path / "run" / "layers.json").exists()
    steps = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert all("supervision_factor" not in line and "thinking_loss" not in line for line in steps)
    trained = "heldout_en" if method == "sft" else "heldout_sw"
    task = result.results["tasks"][trained]
    assert task["value"] < task["base"]["value"]


def test_single_held_out_row_gives_valid_json(tmp_path):
    go(tmp_path, data=data(tmp_path, validation=1))
    results = json.loads((tmp_path / "run" / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["tasks"]["heldout_sw"]["stderr"] is None


def test_no_held_out_rows(tmp_path):
    result = go(tmp_path, data=data(tmp_path, validation=0))
    assert result.results["tasks"] == {}
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_measured_start_is_not_measured_again(tmp_path, monkeypatch):
    first = go(tmp_path)
    titles: list[str] = []
    score = run_module._score
    monkeypatch.setattr(run_module, "_score", lambda *args: titles.append(args[-1]) or score(*args))
    again = execute_run(prepare_run(run_config(tmp_path, output_dir=str(tmp_path / "b"))), before=first.before)
    assert titles == ["Scoring the trained model"]
    assert again.results["tasks"] == first.results["tasks"]


# ---- what is saved ----


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_weights_keep_the_type_they_came_in(tmp_path, lora):
    """Trained in float32 (adapters: on the base as it is), saved as bfloat16, and the returned model is the saved one."""
    save_tiny_model(tmp_path / "half", dtype=torch.bfloat16)
    result = go(tmp_path, model=str(tmp_path / "half"), lora=lora)
    tensors = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    start = load_file(tmp_path / "half" / "model.safetensors")
    assert any(not torch.equal(tensor, start[name]) for name, tensor in tensors.items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            result.model.eval()(input_ids=ids).logits, loaded(input_ids=ids).logits, rtol=0, atol=1e-6
        )


def test_adapters_are_merged_and_also_kept_apart(tmp_path):
    from peft import PeftModel

    result = go(tmp_path, lora={"r": 4, "dropout": 0.1})
    names = {path.name for path in (tmp_path / "run" / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not any(name.endswith(".bin") for name in names)
    assert "adapter_config.json" not in {path.name for path in (tmp_path / "run" / "model").iterdir()}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, result.model(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_training_goes_on_from_a_run_and_from_its_adapter(tmp_path):
    go(tmp_path, lora={"r": 4})
    first = json.loads((tmp_path / "run" / "results.json").read_text())["tasks"]["heldout_sw"]
    for number, start in enumerate(("run", "run/adapter")):
        for lora in (None, {"r": 2}):
            output = str(tmp_path / f"next-{number}-{lora is None}")
            result = go(tmp_path, model=str(tmp_path / start), output_dir=output, lora=lora)
            assert not hasattr(result.model, "peft_config")
            task = result.results["tasks"]["heldout_sw"]
            assert task["base"]["value"] == pytest.approx(first["value"], rel=1e-5)
            assert task["value"] < task["base"]["value"]


def test_same_configuration_same_run(tmp_path):
    for lora in (None, {"r": 4, "dropout": 0.2}):
        one = go(tmp_path, lora=lora, output_dir=str(tmp_path / f"a{lora is None}"))
        torch.manual_seed(99)
        other = go(tmp_path, lora=lora, output_dir=str(tmp_path / f"b{lora is None}"))
        assert_same(*(load_file(run.folder / "model" / "model.safetensors") for run in (one, other)))


# ---- interruption ----


def run_until_killed(settings: dict[str, Any], step: int, where: str) -> None:
    """Train in a process of its own, which dies after a step or in the middle of its checkpoint."""

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if where == "training" and state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

    save = TrainerState.save_to_json

    def save_or_die(self: TrainerState, path: str) -> None:
        if where == "saving" and self.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, path)

    TrainerState.save_to_json = save_or_die
    execute_run(prepare_run(parse_config(settings)), callbacks=[Kill()])


def timeless(folder: Path) -> list[dict[str, Any]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if "per_second" not in k and "runtime" not in k} for line in lines]


@pytest.mark.parametrize(
    ("step", "where", "left", "lora"),
    [
        (5, "training", ["checkpoint-2", "checkpoint-4"], {"r": 4, "dropout": 0.2}),
        (4, "saving", ["checkpoint-2"], None),
        (1, "training", [], None),
    ],
    ids=["in the middle of an epoch", "while a checkpoint is written", "before the first checkpoint"],
)
def test_run_killed_and_resumed_equals_one_that_was_not(tmp_path, step, where, left, lora):
    training = {**TRAINING, "max_steps": 7, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
                "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3}  # fmt: skip
    settings = run_settings(tmp_path, training=training, lora=lora)
    program = "runs.test_execute:run_until_killed"
    killed = Process(tmp_path / "log.txt", program=program, arguments=[settings, step, where])
    assert killed.wait() == -signal.SIGKILL, killed.output
    run = tmp_path / "run"
    assert sorted(path.name for path in run.glob("checkpoint-*")) == left
    assert not (run / "model").exists()
    config = parse_config(settings)
    execute_run(prepare_run(config, resume=True), resume=True)

    straight = execute_run(prepare_run(parse_config({**settings, "output_dir": str(tmp_path / "straight")}))).folder
    assert_same(*(load_file(folder / "model" / "model.safetensors") for folder in (run, straight)))
    assert timeless(run) == timeless(straight)
    assert "train_loss" in timeless(run)[-1]
    assert json.loads((run / "results.json").read_text()) == json.loads((straight / "results.json").read_text())
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in straight.iterdir())


def test_resuming_a_run_at_its_last_step_trains_no_further(tmp_path):
    """The run was killed between its last checkpoint and its last files."""
    settings = {"training": {**QUIET, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}}
    config = run_config(tmp_path, **settings)
    first = execute_run(prepare_run(config))
    weights = load_file(first.folder / "model" / "model.safetensors")
    (first.folder / "results.json").unlink()
    again = execute_run(prepare_run(config, resume=True), resume=True)
    assert sorted(path.name for path in again.folder.glob("checkpoint-*"))[-1] == "checkpoint-3"
    assert max(line["step"] for line in read_metrics(again.folder / "metrics.jsonl")) == 3
    assert_same(load_file(again.folder / "model" / "model.safetensors"), weights)
    assert again.results == first.results


def test_resumed_run_keeps_the_scores_it_began_with(tmp_path, monkeypatch):
    """Unless the held-out rows are others; and no other run's."""
    settings = {"training": {**QUIET, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}}
    config = run_config(tmp_path, **settings)
    first = execute_run(prepare_run(config))
    titles: list[str] = []
    score = run_module._score
    monkeypatch.setattr(run_module, "_score", lambda *args: titles.append(args[-1]) or score(*args))
    again = execute_run(prepare_run(config, resume=True), resume=True)
    assert titles == ["Scoring the trained model"]
    assert again.results == first.results
    prepared = prepare_run(config, resume=True)
    prepared.validation = store_pairs(prepared.validation[:-1])
    execute_run(prepared, resume=True)
    assert titles[1:] == ["Scoring the starting model", "Scoring the trained model"]


def test_resumed_run_refuses_other_rows(tmp_path):
    config = run_config(tmp_path)
    go(tmp_path)
    prepare_run(config, resume=True)
    lines = Path(config.data.train).read_text().splitlines()
    first, second, *_ = [pair.number - 1 for pair in prepare_run(config, resume=True).train]
    swapped, reworded = [*lines], [*lines]
    swapped[first], swapped[second] = lines[second], lines[first]
    reworded[first] = lines[first].replace("Namba", "Nambari")
    for changed in (lines[1:], swapped, reworded):
        Path(config.data.train).write_text("\n".join(changed) + "\n")
        with pytest.raises(UsageError, match=r"--resume: .*rows\.jsonl is not what the run in .* began with"):
            prepare_run(config, resume=True)
    Path(config.data.train).write_text("\n".join(lines) + "\n")
    # A run of an earlier version has no record.
    (tmp_path / "run" / "rows.json").unlink()
    prepare_run(config, resume=True)


def test_what_a_process_left_that_was_killed_at_once_is_no_run(tmp_path):
    """`--auto-resume` starts there."""
    config = run_config(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".config.yaml.abc_1xyz").touch()
    prepare_run(config)
    with pytest.raises(UsageError, match="there is no run in"):
        prepare_run(config, resume=True)
    (folder / "notes").touch()
    with pytest.raises(UsageError, match="is not empty and holds no run"):
        prepare_run(config)


@pytest.mark.parametrize("fails", ["load_model", "measure_layers", "score_answers"])
def test_a_run_that_failed_before_its_first_step_leaves_a_free_folder(tmp_path, monkeypatch, fails):
    """The corrected command needs no --overwrite, and nothing of the first one stays in its results."""
    prepared = prepare_run(run_config(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(run_module, fails, raise_broken)
        with pytest.raises(RuntimeError, match="broken"):
            execute_run(prepared)
    assert (tmp_path / "run" / "config.yaml").is_file()
    corrected = run_config(tmp_path, method="tft", seed=3)
    folder = execute_run(prepare_run(corrected)).folder
    assert (folder / "results.json").is_file()
    assert not (folder / "layers.json").exists()
    with pytest.raises(UsageError, match="already holds a run"):
        prepare_run(corrected)


def raise_broken(*args, **kwargs):
    raise RuntimeError("broken")


def test_resumed_run_keeps_the_layers_it_began_with(tmp_path, monkeypatch):
    settings = {"training": {**QUIET, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}}
    config = run_config(tmp_path, **settings)
    folder = execute_run(prepare_run(config)).folder
    layers = read_layers_json(folder / "layers.json")
    monkeypatch.setattr(run_module, "measure_layers", lambda *args, **kwargs: pytest.fail("measured again"))
    assert execute_run(prepare_run(config, resume=True), resume=True).layers == layers


def test_a_folder_of_another_machine_is_waited_for(tmp_path, monkeypatch):
    """A network file system may not show it at once."""
    folder, seen = tmp_path / "run", []
    monkeypatch.setattr(run_module.time, "sleep", lambda seconds: seen.append(seconds) or folder.mkdir(exist_ok=True))
    run_module._wait_for_shared(folder)
    assert len(seen) == 1
    folder.rmdir()
    monkeypatch.setattr(run_module, "_SEEN_AFTER", 0.0)
    with pytest.raises(UsageError, match="is not on a file system that all machines of the run share"):
        run_module._wait_for_shared(folder)
