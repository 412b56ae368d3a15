"""Run `pivotune sweep` as a user types it."""

from __future__ import annotations

import json
import os
import signal

import pytest
import yaml
from tiny_training import run_settings

from pivotune.cli.main import main

SWEEP = ("--grid", "supervision.thinking.layer=2,3", "--set", "supervision.conversion.layer=1")


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = run_settings(tmp_path)
    settings["training"] |= {"max_steps": 2, "save_strategy": "no"}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def sweep(config, *options) -> int:
    return main(["sweep", str(config), *map(str, options)])


def refused(capsys, config, *options) -> str:
    capsys.readouterr()
    assert sweep(config, *options) == 2
    err = capsys.readouterr().err
    assert err.startswith("pivotune: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("pivotune: error: ").rstrip("\n")


@pytest.mark.exhaustive
def test_layer_sweep_with_seeds_gives_tables_and_figure_3(config, tmp_path, capsys):
    grid = ("--grid", "method=tft,deep-supervision", *SWEEP, "--seeds", "0,1")
    assert sweep(config, *grid) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "sweeps" / "run"
    points = ["method=tft", *(f"method=deep-supervision,thinking.layer={layer}" for layer in (2, 3))]
    cells = [f"{point},seed={seed}" for seed in (0, 1) for point in points]
    files = {"sweep.json", "table.md", "table.csv", "table.tex", "layers.png", "layer-scores.json"}
    assert {path.name for path in folder.iterdir()} == {*cells, *files}
    assert "[6/6] method=deep-supervision,thinking.layer=3,seed=1: to train" in out
    assert "saved " in out.splitlines()[-1]
    for name in ("table.md", "table.csv", "table.tex"):
        assert "thinking.layer=3" in (folder / name).read_text(encoding="utf-8").replace(r"\_", "_")
    assert (folder / "layers.png").read_bytes().startswith(b"\x89PNG")
    curve = json.loads((folder / "layer-scores.json").read_text())
    series = {one["label"]: one for one in curve["series"]}
    assert set(series) == {"heldout_sw", "heldout_en"}
    values = [
        json.loads((folder / cell / "results.json").read_text())["tasks"]["heldout_sw"]["value"] for cell in cells
    ]
    assert series["heldout_sw"]["baseline"] == pytest.approx((values[0] + values[3]) / 2)
    assert series["heldout_sw"]["points"][1]["value"] == pytest.approx((values[2] + values[5]) / 2)
    # The same command finds everything done.
    tables = [(folder / f"table.{kind}").read_bytes() for kind in ("md", "csv", "tex")]
    assert sweep(config, *grid, "--dry-run") == 0
    lines = [*(f"{cell}: done" for cell in cells), "6 of 6 cells are done, in sweeps/run"]
    assert capsys.readouterr().out.splitlines() == lines
    assert sweep(config, *grid) == 0
    assert tables == [(folder / f"table.{kind}").read_bytes() for kind in ("md", "csv", "tex")]


def test_dry_run_writes_nothing(config, tmp_path, capsys):
    before = set(tmp_path.iterdir())
    assert sweep(config, "--ablation", "--signals", "logits,feature", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == [
        "tft,seed=0: to train",
        "LC=logits,seed=0: to train",
        "ET=logits,seed=0: to train",
        "LC=logits,ET=logits,seed=0: to train",
        "LC=feature,seed=0: to train",
        "ET=feature,seed=0: to train",
        "LC=feature,ET=feature,seed=0: to train",
        "0 of 7 cells are done, in sweeps/run-ablation",
    ]
    assert set(tmp_path.iterdir()) == before


def test_ablation_trains_what_its_names_say(config, tmp_path):
    assert sweep(config, "--ablation", "--out", "table3") == 0
    terms = {}
    for folder in (tmp_path / "table3").iterdir():
        if folder.is_dir():
            first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
            terms[folder.name] = {name for name in ("conversion_loss", "thinking_loss") if name in first}
    assert terms == {
        "tft,seed=0": set(),
        "LC=logits,seed=0": {"conversion_loss"},
        "ET=logits,seed=0": {"thinking_loss"},
        "LC=logits,ET=logits,seed=0": {"conversion_loss", "thinking_loss"},
    }
    assert not (tmp_path / "table3" / "layers.png").exists()


def test_evaluation_of_the_cells_and_the_starting_model(config, tmp_path, shared_data, capsys):
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    options = ("--tasks", "xcopa_vi", "--data-dir", shared_data / "eval", "--limit", "4")
    assert sweep(config, *SWEEP, *options, "--dry-run") == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["tasks: xcopa_vi", "base: to evaluate: xcopa_vi"]
    assert sweep(config, *SWEEP, *options, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert [cell["state"] for cell in plan["cells"]] == ["done", "done"]
    for name in ("base", "thinking.layer=2,seed=0", "thinking.layer=3,seed=0"):
        results = json.loads((tmp_path / "sweeps" / "run" / name / "results.json").read_text())
        assert results["tasks"]["xcopa_vi"]["n"] == 4
        assert results["model"] == str(tmp_path / "base")
    assert "base" in (tmp_path / "sweeps" / "run" / "table.md").read_text()
    assert sweep(config, *SWEEP, *options, "--dry-run") == 0
    assert "2 of 2 cells are done" in capsys.readouterr().out


def test_failed_cells_are_listed_and_the_exit_code_is_1(config, tmp_path, capsys):
    changes = ("--set", "method=tft", "--set", "training.max_steps=4")
    assert sweep(config, "--grid", "training.learning_rate=1e30,1e-3", *changes) == 1
    out = capsys.readouterr().out
    assert "1 failed; the same command tries them again:\n  learning_rate=1e30,seed=0: TrainingDivergedError" in out
    assert "saved " in out
    table = (tmp_path / "sweeps" / "run" / "table.csv").read_text()
    assert "learning_rate=1e-3" in table
    assert "1e30" not in table


def test_interruption_says_how_to_go_on(config, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("pivotune.sweeps.run.execute_run", interrupt)
    assert sweep(config, *SWEEP) == 130
    assert "the same command goes on from here" in capsys.readouterr().err


def test_a_signal_in_the_preparation_is_told_by_the_exit_code(config, capsys, monkeypatch):
    monkeypatch.setattr("pivotune.sweeps.run.prepare_run", lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM))
    assert sweep(config, *SWEEP) == 75
    assert "stopped by SIGTERM: the same command goes on from here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to vary: give --grid key=v1,v2, --ablation or --seeds 0,1,2"),
        (("--signals", "logits", *SWEEP), "--signals goes with --ablation"),
        ((*SWEEP, "--set", "output_dir=x"), "--set output_dir: the cells of a sweep are written below --out"),
        ((*SWEEP, "--batch-size", "0"), "--batch-size: '0' found; allowed: a number from 1, or auto"),
        (("--ablation", "--signals", "both"), "--signals both: 'both' found; allowed: logits, feature, contrastive, cka"),
        (("--grid", "supervision.thinking.layer"), "--grid supervision.thinking.layer: expected key=value,value such as "
         "supervision.thinking.layer=5,10,15"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(config, capsys, options, message):
    assert refused(capsys, config, *options) == message


def test_missing_file_is_named(tmp_path, capsys):
    assert refused(capsys, tmp_path / "run.yaml", *SWEEP) == f"{tmp_path / 'run.yaml'}: no such file"


def test_unknown_task_is_refused_before_training(config, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    assert refused(capsys, config, *SWEEP, "--tasks", "xquat_vi").startswith("--tasks: no task 'xquat_vi'")
    assert not (tmp_path / "sweeps").exists()
