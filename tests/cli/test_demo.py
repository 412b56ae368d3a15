from __future__ import annotations

import json
import struct
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_model, build_tiny_tokenizer
from transformers import AutoModelForCausalLM

pytest.importorskip("babel", reason="the package Babel is not installed")

from pivotune.cli import demo as demo_verb
from pivotune.cli.main import main
from pivotune.cli.training_display import TrainingProgress
from pivotune.config.yaml_text import load_config
from pivotune.demo import run as demo_module
from pivotune.demo.rows import SUPPORTED_LANGUAGES
from pivotune.demo.run import METHODS, DemoSettings, exact_match, run_demo
from pivotune.results.files import read_results
from pivotune.training.trainer import DeepSupervisionTrainer

MODELS = ("base", *METHODS)
PICTURES = ("layers.png", "entropy.png", "heldout.png", "training.png")
SMALL = {"rows": 40, "heldout": 6, "answered": 4, "profiled": 4}


@pytest.fixture(scope="module")
def tiny_demo(tmp_path_factory):
    """The demo on a tiny model in place of the real one, with few held-out rows."""
    folder = tmp_path_factory.mktemp("start")
    build_tiny_model(max_position_embeddings=1024).save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "MODEL", str(folder))
        patch.setattr(demo_module, "DemoSettings", partial(DemoSettings, **{**SMALL, "rows": 512}))
        yield


@pytest.fixture(scope="module")
def finished(tiny_demo, tmp_path_factory):
    """A finished demo: its folder, what was printed, and the batches each method trained on."""
    out = tmp_path_factory.mktemp("demo") / "out"
    batches: dict[str, list] = {method: [] for method in METHODS}
    compute_loss = DeepSupervisionTrainer.compute_loss

    def recording(self, model, inputs, *args, **kwargs):
        batches[self.args.method].append((inputs["input_ids"].tolist(), inputs["labels"].tolist()))
        return compute_loss(self, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeepSupervisionTrainer, "compute_loss", recording)
        patch.setenv("COLUMNS", "200")
        printed: list[str] = []
        patch.setattr(demo_verb, "console", lambda as_json: _Recording(printed))
        assert main(["demo", "--lang", "sw", "--rows", str(SMALL["rows"]), "--out", str(out)]) == 0
    return out, "".join(printed), batches


class _Recording:
    """A console that keeps what it is told."""

    def __init__(self, printed: list[str]) -> None:
        from rich.console import Console

        self._printed = printed
        self._console = Console(width=200, highlight=False)

    def print(self, *objects, **options) -> None:
        with self._console.capture() as capture:
            self._console.print(*objects, **options)
        self._printed.append(capture.get())


def results_of(out: Path) -> dict:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys, *words: str) -> str:
    capsys.readouterr()
    assert main(["demo", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("pivotune: error: ").rstrip("\n")


def test_results(finished):
    out, _, _ = finished
    results = results_of(out)
    assert results["settings"] == asdict(DemoSettings(language="sw", **SMALL))
    assert set(results["models"]) == set(MODELS)
    for name, measured in results["models"].items():
        assert set(measured) == {"target", "english", "profile"}, name
        for side in ("target", "english"):
            scores = measured[side]
            assert (scores["rows"], scores["answered"], len(scores["answers"])) == (6, 4, 4)
            assert scores["nll"] > 0
            assert scores["stderr"] > 0
            assert scores["nll_per_character"] > 0
            matches = [exact_match(answer["answer"], answer["gold"]) for answer in scores["answers"]]
            assert scores["exact_match"] == sum(matches) / 4
        assert len(measured["profile"]["entropy"]) == 5
        assert measured["profile"]["sequences"] == 4
    assert 1 <= results["layers"]["conversion"] < results["layers"]["thinking"] < 4


def test_every_model_answers_the_same_held_out_questions(finished):
    out, _, _ = finished
    models = results_of(out)["models"]
    held_out = {(row["prompt"], row["completion"]) for row in rows_of(out / "validation.jsonl")}
    held_out |= {(row["prompt_en"], row["completion_en"]) for row in rows_of(out / "validation.jsonl")}
    for side in ("target", "english"):
        asked = [[(answer["question"], answer["gold"]) for answer in models[name][side]["answers"]] for name in MODELS]
        assert asked[0] == asked[1] == asked[2]
        assert set(asked[0]) <= held_out


def test_numbers_are_those_of_the_runs(finished):
    """The base model's scores are what both runs measured before training; training lowered the target's."""
    out, _, _ = finished
    models = results_of(out)["models"]
    for method in METHODS:
        tasks = results_of(out / method)["tasks"]
        for side, task in (("target", "heldout_sw"), ("english", "heldout_en")):
            assert models["base"][side]["nll"] == pytest.approx(tasks[task]["base"]["value"])
            assert models[method][side]["nll"] == pytest.approx(tasks[task]["value"])
    assert models["tft"]["target"]["nll"] < models["base"]["target"]["nll"]
    profiles = [models[name]["profile"]["entropy"] for name in MODELS]
    assert profiles[0] != profiles[1]
    assert profiles[1] != profiles[2]


def test_both_methods_see_the_same_rows_in_the_same_order(finished):
    out, _, batches = finished
    assert batches["tft"] == batches["deep-supervision"]
    assert sum(len(rows) for rows, _ in batches["tft"]) == SMALL["rows"]
    configs = [load_config(out / method / "config.yaml") for method in METHODS]
    assert [config.method for config in configs] == list(METHODS)
    tft, deep = (config.model_dump(exclude={"method", "output_dir"}) for config in configs)
    assert tft == deep


def test_the_methods_end_with_different_models(finished):
    trained = [AutoModelForCausalLM.from_pretrained(finished[0] / method / "model").state_dict() for method in METHODS]
    assert any(not torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(finished, name):
    content = (finished[0] / name).read_bytes()
    assert content.startswith(b"\x89PNG")
    # Width and height stand at the begin of the first block.
    assert min(struct.unpack(">II", content[16:24])) > 300


def test_what_is_printed(finished):
    out, printed, _ = finished
    models = results_of(out)["models"]
    assert "40 rows to train on, 6 held out" in printed
    table = {line.split("│")[1].strip(): line for line in printed.splitlines() if "±" in line and "│" in line}
    assert list(table) == ["base", "TFT", "deep supervision"]
    for name, line in zip(MODELS, table.values(), strict=True):
        for side in ("target", "english"):
            scores = models[name][side]
            assert f"{scores['nll']:.3f} ± {scores['stderr']:.3f}" in line
            assert f"{scores['exact_match']:.0%}" in line
    assert "6 held-out rows scored" in printed
    assert models["base"]["target"]["answers"][0]["gold"] in printed
    assert f"talk to both: pivotune chat {out / 'deep-supervision'} --compare {out / 'tft'}\n" in printed


def test_an_earlier_demo_is_kept_unless_told(finished, capsys):
    out = finished[0]
    before = files(out)
    text = refused(capsys, "--lang", "de", "--out", str(out))
    assert text == f"--out: {out} already holds a demo; add --overwrite or choose another folder"
    assert files(out) == before


@pytest.mark.usefixtures("tiny_demo")
def test_json_overwrite_and_the_feature_signal(tmp_path, capsys):
    out = tmp_path / "out"
    (out / "tft").mkdir(parents=True)  # what a demo leaves that was stopped early
    (out / "notes.txt").write_text("mine")
    words = ["--lang", "de", "--rows", "16", "--signal", "feature", "--out", str(out), "--json"]
    assert main(["demo", *words, "--overwrite"]) == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert results == results_of(out)
    assert results["settings"] == asdict(DemoSettings(language="de", signal="feature", **{**SMALL, "rows": 16}))
    assert "16 rows to train on" in captured.err
    assert load_config(out / "deep-supervision" / "config.yaml").supervision.thinking.signal == "feature"
    assert (out / "notes.txt").read_text() == "mine"
    assert all((out / name).is_file() for name in PICTURES)


@pytest.mark.usefixtures("tiny_demo")
def test_a_folder_of_something_else(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text("mine")
    (tmp_path / "results.json").write_text("{}")
    before = files(tmp_path)
    for words in ([], ["--overwrite"]):
        text = refused(capsys, "--out", str(tmp_path), *words)
        assert text == f"--out: {tmp_path} is not empty and holds no demo; choose another folder"
    text = refused(capsys, "--out", str(tmp_path / "train.jsonl"))
    assert text == f"--out: {tmp_path / 'train.jsonl'} is a file; name a folder"
    assert files(tmp_path) == before


@pytest.mark.usefixtures("tiny_demo")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--lang", "tlh"], f"the demo has no language 'tlh'; supported: {', '.join(SUPPORTED_LANGUAGES)}"),
        (["--signal", "none"], "--signal: 'none' is not allowed; allowed: logits, feature"),
    ],
)
def test_unsupported_options_before_anything_is_written(words, expected, tmp_path, capsys):
    assert refused(capsys, "--out", str(tmp_path / "out"), *words) == expected
    assert not (tmp_path / "out").exists()


def test_a_missing_model_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_module, "MODEL", str(tmp_path / "no" / "model"))
    text = refused(capsys, "--out", str(tmp_path / "out"))
    assert text.startswith(f"{tmp_path / 'no' / 'model'}: no such folder")
    assert not (tmp_path / "out").exists()


def test_the_help_names_the_supported_languages(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["demo", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for code in SUPPORTED_LANGUAGES:
        assert f" {code}" in text


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("Hà Nội.", "Hà Nội", True),
        ("Hà  Nội \n", "Hà Nội.", True),
        ("Ha\u0300 No\u0323\u0302i", "Hà Nội", True),  # decomposed
        ("東京。", "東京", True),
        ("Hà Nội .", "Hà Nội", True),
        ("hà nội", "Hà Nội", False),
        ("Ha Noi", "Hà Nội", False),
        ("Hà Nội là thủ đô", "Hà Nội", False),
        ("", "Hà Nội", False),
        ("1.5", "15", False),
    ],
)
def test_exact_match(answer, gold, same):
    assert exact_match(answer, gold) is same
    assert exact_match(gold, answer) is same


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_real_model_learns_the_facts(smollm2, tmp_path, monkeypatch):
    from pivotune.cli.common import progress

    # The other tests of this file put a tiny model in its place for as long as the file runs.
    monkeypatch.setattr(demo_module, "MODEL", smollm2)
    as_it_is = demo_module.demo_config

    def rough_lens(*arguments):
        config = as_it_is(*arguments)
        tuned = config.supervision.tuned.model_copy(update={"states": 600, "steps": 2})
        return config.model_copy(update={"supervision": config.supervision.model_copy(update={"tuned": tuned})})

    monkeypatch.setattr(demo_module, "demo_config", rough_lens)
    settings = DemoSettings(language="vi", rows=32, heldout=6, answered=2, profiled=2)
    shown = []
    results = run_demo(
        tmp_path / "out", settings, progress=progress, callback=TrainingProgress, on_prepared=shown.append
    )
    assert results == results_of(tmp_path / "out")
    assert shown[0].config.model == smollm2
    models = results["models"]
    assert len(models["base"]["profile"]["entropy"]) == 31
    for method in METHODS:
        assert models[method]["target"]["nll"] < models["base"]["target"]["nll"]


def test_it_ends_with_a_report_of_all_three_models(finished):
    out, printed, _ = finished
    page = out / "report.html"
    assert printed.endswith(f"look at everything in a browser: {page}\n")
    content = page.read_text(encoding="utf-8")
    assert len(content.encode()) < 3_000_000
    for section in ("Summary", "Scores", "Layers", "Training", "Sample answers", "Data", "How to reproduce"):
        assert f"{section}</h2>" in content
    assert "facts_sw" in content
    base = read_results(out / "base.json")
    assert base.tasks["heldout_sw"].metrics["nll"].value == pytest.approx(
        results_of(out)["models"]["base"]["target"]["nll"]
    )
