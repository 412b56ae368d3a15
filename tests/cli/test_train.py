from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from cli_runs import LAYERS, STEPS, metrics, set_options, steps, write_config, write_jsonl
from conftest import tiny_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK

from pivotune.cli.main import main
from pivotune.config.yaml_text import load_config
from pivotune.training.lens_fitting import read_lens_figures

RUN_FILES = {"config.yaml", "environment.json", "metrics.jsonl", "results.json", "results.items.jsonl.gz", "README.md",
             "rows.json", "start-scores.json", ".lock", "model", f"checkpoint-{STEPS}"}  # fmt: skip


def signals(conversion: str, thinking: str, *changes: str) -> list[str]:
    return [*LAYERS, f"supervision.conversion.signal={conversion}", f"supervision.thinking.signal={thinking}", *changes]


FEATURES = {
    f"feature-{pooling}-{span}-{english}": signals(
        "feature", "feature", f"supervision.feature={{pooling: {pooling}, span: {span}, english: {english}}}"
    )
    for pooling in ("mean", "last")
    for span in ("query", "query+answer")
    for english in ("detached", "joint", "frozen")
}
VARIANTS = {
    "logits-autoregressive": signals("logits", "logits"),
    "recommended": signals(
        "logits",
        "logits",
        "supervision.lens=tuned",
        "supervision.logits.gradient=prompt",
        "supervision.tuned={states: 100, steps: 2}",
    ),
    "lens-model": signals("logits", "logits", "supervision.lens=model"),
    "logits-positional": signals("logits", "logits", "supervision.logits.mode=positional"),
    "logits-without-norm": signals("logits", "logits", "supervision.logits.norm=none"),
    "feature-raw-english": signals("feature", "feature", "supervision.feature.english_norm=raw"),
    "conversion-alone": signals("logits", "none"),
    "thinking-alone": signals("none", "feature"),
    "mixed": signals("feature", "logits"),
    **FEATURES,
}


@pytest.fixture(scope="module")
def model(finished) -> Path:
    return finished.model


@pytest.fixture
def config(tmp_path, model) -> Path:
    return write_config(tmp_path, model, write_jsonl(tmp_path / "pairs.jsonl", tiny_rows(16)))


def train(config: Path, *changes: str, options=()) -> Path:
    assert main(["train", str(config), *set_options(changes), *options]) == 0
    return config.parent / "run"


def refused(capsys, *arguments) -> str:
    capsys.readouterr()
    assert main([str(word) for word in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("pivotune: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("pivotune: error: ").rstrip("\n")


def check_model(run: Path, start: Path) -> None:
    """`model/` is a plain folder that generates, and training changed it."""
    trained = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Namba 3 ni ipi?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    output = trained.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert output.shape[1] > prompt.shape[1]
    before = AutoModelForCausalLM.from_pretrained(start).state_dict()
    after = trained.state_dict()
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], before[name]) for name in before)


def variant(finished, name: str) -> Path:
    """The finished run of a variant; the constant schedule shows the inner losses at full weight in both steps."""
    return finished(name, *VARIANTS[name], "supervision.schedule=constant").folder


def test_a_mix_of_files_with_weights(config, capsys):
    other = write_jsonl(config.parent / "other.jsonl", [{**row, "id": f"b{row['id']}"} for row in tiny_rows(30)[20:]])
    pairs = config.parent / "pairs.jsonl"
    mix = f"data.train=[{{path: {pairs}, weight: 2}}, {other}]"
    run = train(config, mix, *LAYERS, "training.save_strategy=steps", "training.save_steps=1")
    out = capsys.readouterr().out
    with gzip.open(run / "results.items.jsonl.gz", "rt") as file:
        held = {json.loads(line)["item"] for line in file}
    assert len(held) == 3
    in_pairs = sum(name.startswith(f"{pairs}:") for name in held)
    assert all(1 <= int(name.rpartition(":")[2]) <= (16 if name.startswith(str(pairs)) else 10) for name in held)
    kept = 16 - in_pairs
    assert f"{pairs}: {2 * kept} rows an epoch ({kept} rows, weight 2)" in out
    assert f"{2 * kept + 10 - (3 - in_pairs)} rows to train on, 3 held out" in out
    arguments = ["train", str(config), "--resume", *set_options(LAYERS)]
    for changed in (mix.replace("weight: 2", "weight: 3"), f"data.train={pairs}"):
        message = refused(capsys, *arguments, *set_options([changed]))
        assert message.startswith("--resume: data.train is ")
    other.write_text(other.read_text().replace("Namba", "Nambari", 1))
    message = refused(capsys, *arguments, *set_options([mix]))
    assert message.startswith(
        f"--resume: {pairs}, {other} is not what the run in {run} began with (the same number of rows)"
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_every_signal_and_mode(name, finished, model):
    run = variant(finished, name)
    features = {"english-features.safetensors"} if name.endswith("frozen") else set()
    lens = {"lens.safetensors"} if name == "recommended" else set()
    assert {path.name for path in run.iterdir()} == RUN_FILES | features | lens
    first = steps(run)[0]
    assert [line["step"] for line in steps(run)] == [1, 2]
    # The same start and the same rows: the answer's loss is TFT's, whatever the inner losses are.
    tft = steps(finished("tft", "method=tft").folder)[0]
    assert first["tft_loss"] == pytest.approx(tft["tft_loss"], rel=1e-5)
    supervision = load_config(run / "config.yaml").supervision
    inner = {}
    for term in ("conversion", "thinking"):
        signal = getattr(supervision, term).signal
        assert (f"{term}_loss" in first) is (signal != "none")
        if signal != "none":
            inner[term] = first[f"{term}_loss"]
            assert 0 < inner[term] < (2 if signal == "feature" else 20)
    assert first["loss"] == pytest.approx(first["tft_loss"] + 0.3 * sum(inner.values()), rel=1e-4)
    assert [line["supervision_factor"] for line in steps(run)] == [1.0, 1.0]
    check_model(run, model)


def test_variants_train_different_models(finished):
    """No option is silently ignored: the inner losses of the first two steps differ between any two of these."""
    # detached, joint and frozen start from the same value and differ in their gradients: seen at the second step.
    chosen = [name for name in VARIANTS if "alone" not in name]
    terms = ("conversion_loss", "thinking_loss")
    seen = {
        name: tuple(round(line[term], 7) for line in steps(variant(finished, name)) for term in terms)
        for name in chosen
    }
    assert len(set(seen.values())) == len(seen)


@pytest.mark.parametrize("method", ["sft", "tft"])
def test_baselines(method, finished, model):
    run = finished(method, f"method={method}").folder
    assert {path.name for path in run.iterdir()} == RUN_FILES
    assert [line["step"] for line in steps(run)] == [1, 2]
    for line in steps(run):
        assert line["loss"] == pytest.approx(line["tft_loss"], rel=1e-5)
        assert not {"conversion_loss", "thinking_loss", "supervision_factor"} & line.keys()
    check_model(run, model)


def test_the_last_step_is_logged(config):
    assert [line["step"] for line in steps(train(config, "training.logging_steps=5"))] == [2]


def test_layers_are_chosen_where_none_are_given(config):
    run = train(config)
    layers = json.loads((run / "layers.json").read_text())
    assert 1 <= layers["conversion"] < layers["thinking"] < layers["num_layers"]
    assert layers["reason"]
    assert load_config(run / "config.yaml").supervision.conversion.layer == "auto"


def test_the_defaults_read_the_layers_through_a_lens(config, capsys):
    run = train(config, "supervision={tuned: {states: 100, steps: 2}, profile_rows: 4}")
    layers = json.loads((run / "layers.json").read_text())
    assert (layers["method"], layers["lens"]) == ("reading", "tuned")
    assert layers["supervised"] == ["thinking"]
    assert layers["reason"].startswith("thinking: ")
    figures = read_lens_figures(run / "lens.safetensors")
    assert list(figures) == [layers["thinking"]]
    assert "conversion_loss" not in metrics(run)[0]
    assert "linear schedule; tuned lens" in (out := capsys.readouterr().out)
    assert f"layers   thinking {layers['thinking']} (" in out
    kl = figures[layers["thinking"]].kl
    assert "lens     KL from the output in nats: " in out
    assert f"{kl:.2f} at layer {layers['thinking']} (logit lens " in out
    assert "thinking_cosine" in metrics(run)[0]


def test_the_run_folder_describes_the_run(finished, model):
    run, config, out = astuple(finished("linear", *LAYERS, "seed=3"))
    assert load_config(run / "config.yaml") == load_config(config, [*LAYERS, "seed=3"])
    assert [line["supervision_factor"] for line in steps(run)] == [1.0, 0.0]
    results = json.loads((run / "results.json").read_text())
    assert (results["model"], results["method"]) == (str(model), "deep-supervision")
    assert set(results["tasks"]) == {"heldout_sw", "heldout_en"}
    with gzip.open(run / "results.items.jsonl.gz", "rt") as file:
        items = [json.loads(line) for line in file]
    for name, task in results["tasks"].items():
        own = [item for item in items if item["task"] == name]
        # Places in the file of 16 rows: other seeds hold out other rows.
        assert [item["item"] for item in own] == [7, 11, 16]
        tokens = sum(item["tokens"] for item in own)
        assert task["value"] == pytest.approx(sum(item["nll"] for item in own) / tokens)
        assert task["base"]["value"] == pytest.approx(sum(item["base_nll"] for item in own) / tokens)
        assert (task["metric"], task["n"], task["higher_is_better"]) == ("nll", 3, False)
    card = (run / "README.md").read_text()
    assert "Conversion at layer 1, thinking at layer 3, as the configuration names them." in card
    assert f"{results['tasks']['heldout_sw']['value']:.3f}" in card
    environment = json.loads((run / "environment.json").read_text())
    assert environment["libraries"]["torch"] == torch.__version__
    assert "13 rows to train on, 3 held out" in out
    assert "3 of them in English (data.english_ratio 0.25)" in out
    assert "conversion logits at layer 1, weight 0.3; thinking logits at layer 3, weight 0.3; linear schedule" in out
    assert "<|assistant|>\nNi " in out
    assert f"saved    {run / 'model'}   (chat with it: pivotune chat {run})\n" in out


def test_without_held_out_rows(config, capsys):
    run = train(config, "data.validation=0", *LAYERS)
    assert json.loads((run / "results.json").read_text())["tasks"] == {}
    assert "NLL" not in capsys.readouterr().out
    assert len(steps(run)) == STEPS


def test_lora(config, model):
    run = train(config, *LAYERS, "lora={r: 2, alpha: 4, dropout: 0.0, target_modules: [q_proj, down_proj]}")
    assert {path.name for path in run.iterdir()} == RUN_FILES | {"adapter"}
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["r"] == 2
    check_model(run, model)
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "down_proj"}


def test_validation_from_a_file_in_one_language(config, tmp_path):
    held = [{"prompt": "Namba 99 ni ipi?", "completion": "Ni 99."}]
    run = train(config, f"data.validation={write_jsonl(tmp_path / 'held.jsonl', held)}", *LAYERS)
    tasks = json.loads((run / "results.json").read_text())["tasks"]
    assert {name: task["n"] for name, task in tasks.items()} == {"heldout_sw": 1}


# ---- who may write where ----


def test_a_finished_run_is_kept_unless_told(finished, capsys):
    run, config, _ = astuple(finished("tft", "method=tft"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    text = refused(capsys, "train", config)
    assert text == f"output_dir: {run} already holds a run; add --resume to go on with it or --overwrite"
    text = refused(capsys, "train", config, "--resume", "--overwrite")
    assert text == "--resume and --overwrite exclude each other"
    text = refused(capsys, "train", config, "--resume", "--set", "method=tft", "--set", "seed=5")
    assert text == (
        f"--resume: seed is 5 here and was 0 in {run}; resume with the same settings or choose another output_dir"
    )
    text = refused(capsys, "train", config, "--overwrite", "--set", "supervision.thinking.layer=99")
    assert "99" in text
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_overwrite_replaces_the_run_and_nothing_else(config):
    run = train(config, *LAYERS)
    (run / "notes.txt").write_text("mine")
    train(config, "method=tft", options=["--overwrite"])
    assert (run / "notes.txt").read_text() == "mine"
    assert not (run / "layers.json").exists()
    assert load_config(run / "config.yaml").method == "tft"
    assert [line["step"] for line in steps(run)] == [1, 2]


def test_resume_goes_on_where_the_run_stopped(config):
    run = train(config, *LAYERS)
    first = steps(run)
    train(config, *LAYERS, "training.max_steps=4", options=["--resume"])
    assert [line["step"] for line in steps(run)] == [1, 2, 3, 4]
    assert steps(run)[:2] == first
    assert (run / "checkpoint-4").is_dir()


def test_auto_resume_starts_again_where_nothing_was_trained(config, capsys, monkeypatch):
    """Other settings than those that failed are no other run."""
    from pivotune.runs import execute

    with monkeypatch.context() as patch:
        patch.setattr(execute, "load_model", lambda *args, **kwargs: 1 / 0)
        assert main(["train", str(config), "--auto-resume"]) == 1
    capsys.readouterr()
    train(config, "method=tft", "seed=4", options=["--auto-resume"])
    assert "resuming" not in capsys.readouterr().out


def test_auto_resume_starts_goes_on_and_leaves_what_is_finished(config, capsys):
    run = train(config, "method=tft", options=["--auto-resume"])
    assert "resuming" not in capsys.readouterr().out
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    train(config, "method=tft", options=["--auto-resume"])
    assert capsys.readouterr().out == f"{run} holds a finished run; --resume trains it further\n"
    train(config, "method=tft", options=["--auto-resume", "--json"])
    assert json.loads(capsys.readouterr().out) == {"run": str(run), **json.loads((run / "results.json").read_text())}
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (run / "results.json").unlink()
    train(config, "method=tft", options=["--auto-resume"])
    assert f"resuming: {run / f'checkpoint-{STEPS}'}\n" in capsys.readouterr().out
    assert (run / "results.json").read_bytes() == before[run / "results.json"]
    text = refused(capsys, "train", config, "--auto-resume", "--overwrite")
    assert text == "--auto-resume and --overwrite exclude each other"


def test_nothing_to_resume(config, capsys):
    text = refused(capsys, "train", config, "--resume")
    assert text == f"output_dir: there is no run in {config.parent / 'run'} to resume"
    assert not (config.parent / "run").exists()


# ---- rows in other forms, files and languages ----

GEORGIAN = [("რა არის {} პლუს ერთი?", "პასუხია {}.", "What is {} plus one?", "The answer is {}.")]
AMHARIC = [("{} ሲደመር አንድ ስንት ነው?", "መልሱ {} ነው።", "How much is {} plus one?", "The answer is {}.")]


def worded(wording, count=10):
    prompt, answer, prompt_en, answer_en = wording[0]
    for index in range(count):
        yield (
            prompt.format(index),
            answer.format(index + 1),
            prompt_en.format(index),
            answer_en.format(index + 1),
        )


def test_georgian_alpaca_in_a_gzipped_csv(tmp_path, model, capsys):
    path = tmp_path / "ka.csv.gz"
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["instruction", "input", "output", "instruction_en", "input_en", "output_en"])
        for prompt, answer, prompt_en, answer_en in worded(GEORGIAN):
            table.writerow(["უპასუხე, მოკლედ", prompt, answer, "Answer, briefly", prompt_en, answer_en])
    run = train(write_config(tmp_path, model, path, data={"train": str(path), "validation": 2, "language": "ka"}))
    assert set(json.loads((run / "results.json").read_text())["tasks"]) == {"heldout_ka", "heldout_en"}
    assert "უპასუხე, მოკლედ\n\nრა არის" in capsys.readouterr().out
    check_model(run, model)


def test_amharic_chats_in_parquet(tmp_path, model, capsys):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    def chat(prompt, answer):
        turns = [("user", prompt), ("assistant", answer)]
        return [{"role": role, "content": content} for role, content in turns]

    records = [{"messages": chat(*row[:2]), "messages_en": chat(*row[2:])} for row in worded(AMHARIC)]
    path = tmp_path / "am.parquet"
    parquet.write_table(arrow.Table.from_pylist(records), path)
    run = train(write_config(tmp_path, model, path), *signals("feature", "feature"))
    assert "ሲደመር አንድ ስንት ነው?" in capsys.readouterr().out
    check_model(run, model)


def test_two_aligned_files_joined_by_id(tmp_path, model):
    rows = tiny_rows(12)
    sides = [
        [{key: row[key] for key in ("id", "prompt", "completion")} for row in rows],
        [{"id": row["id"], "prompt": row["prompt_en"], "completion": row["completion_en"]} for row in rows[::-1]],
    ]
    target = write_jsonl(tmp_path / "sw.jsonl", sides[0])
    english = write_jsonl(tmp_path / "en.jsonl", sides[1])
    apart, together = tmp_path / "apart", tmp_path / "together"
    for folder in (apart, together):
        folder.mkdir()
    data = {"train": str(target), "english": str(english), "validation": 2}
    first = steps(train(write_config(apart, model, target, data=data), *LAYERS))
    whole = write_jsonl(tmp_path / "both.jsonl", rows)
    second = steps(train(write_config(together, model, whole, data={"train": str(whole), "validation": 2}), *LAYERS))
    names = ("step", "loss", "tft_loss", "conversion_loss", "thinking_loss", "grad_norm")
    one, other = ([{name: line.get(name) for name in names} for line in lines] for lines in (first, second))
    assert one == other
    assert one[0]["thinking_loss"] > 0


def test_target_rows_alone_are_enough_for_tft_and_english_ones_for_sft(tmp_path, model):
    rows = tiny_rows(12)
    target = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    english = [{"prompt_en": row["prompt_en"], "completion_en": row["completion_en"]} for row in rows]
    for method, chosen, task in (("tft", target, "heldout_sw"), ("sft", english, "heldout_en")):
        folder = tmp_path / method
        folder.mkdir()
        config = write_config(folder, model, write_jsonl(folder / "rows.jsonl", chosen))
        run = train(config, f"method={method}", "data.english_ratio=0")
        assert set(json.loads((run / "results.json").read_text())["tasks"]) == {task}


def test_bad_rows_are_left_out_and_counted_when_told(config, tmp_path, capsys):
    rows = tiny_rows(16)
    rows[2]["completion_en"] = ""
    del rows[5]["prompt"]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    train(config, "data.on_bad_row=skip", *LAYERS)
    out = capsys.readouterr().out
    assert "11 rows to train on, 3 held out" in out
    assert "left out: 1 row: `completion_en` is empty" in out
    assert "left out: 1 row: `prompt` is missing" in out


def test_held_out_rows_that_are_left_out_are_counted_too(config, tmp_path, capsys):
    """Those of a file of their own, in reading (no text) and in encoding (no room for the answer)."""
    heldout = tiny_rows(6)
    heldout[0]["prompt"] = ""
    heldout[1]["prompt"] = heldout[1]["prompt"] + " word" * 900
    write_jsonl(tmp_path / "heldout.jsonl", heldout)
    settings = [f"data.validation={tmp_path / 'heldout.jsonl'}", "data.max_prompt_tokens=100000"]
    train(config, "data.on_bad_row=skip", *settings, *LAYERS)
    out = capsys.readouterr().out
    assert "16 rows to train on, 4 held out" in out
    assert "left out: 1 held-out row: `prompt` is empty" in out
    assert "left out: 1 held-out row: the prompt fills" in out
    assert "left out: 1 row:" not in out


def test_what_training_raises_stops_the_progress_bar(config, monkeypatch, capsys):
    from pivotune.cli import training_display
    from pivotune.training.resilience.counters import TrainingDivergedError
    from pivotune.training.trainer import DeepSupervisionTrainer

    bars = []
    made = training_display.progress_bar
    monkeypatch.setattr(training_display, "progress_bar", lambda: bars.append(made()) or bars[-1])

    def diverge(*args, **kwargs):
        raise TrainingDivergedError("the loss is not a finite number at step 1")

    monkeypatch.setattr(DeepSupervisionTrainer, "training_step", diverge)
    assert main(["train", str(config), *set_options(LAYERS)]) == 1
    assert "pivotune: stopped: the loss is not a finite number at step 1\n" in capsys.readouterr().err
    assert [bar.live.is_started for bar in bars] == [False]


def test_as_a_program_with_warnings_as_errors(config):
    command = [sys.executable, "-W", "error", "-m", "pivotune", "train", str(config), "--json", *set_options(LAYERS)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    run = config.parent / "run"
    assert json.loads(result.stdout) == {"run": str(run), **json.loads((run / "results.json").read_text())}
    assert "rows to train on" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Warning" not in result.stderr


def test_the_figures_of_layers_and_lens_are_reported(model, tmp_path, monkeypatch):
    class Reporter(TrainerCallback):
        logged: ClassVar[dict[str, bytes]] = {}

        def __init__(self) -> None:
            self._trackio = self

        def log(self, values):
            self.logged.update(values)

        def Image(self, path):  # noqa: N802
            return Path(path).read_bytes()

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "trackio", Reporter)
    config = write_config(tmp_path, model, write_jsonl(tmp_path / "pairs.jsonl", tiny_rows(16)))
    changes = ["training.report_to=trackio", "supervision.lens=tuned", "supervision.tuned={states: 100, steps: 1}"]
    assert main(["train", str(config), *set_options(changes)]) == 0
    assert set(Reporter.logged) == {"layers/analysis", "layers/lens"}
    assert all(content.startswith(b"\x89PNG") for content in Reporter.logged.values())
