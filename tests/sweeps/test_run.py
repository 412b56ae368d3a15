"""Sweeps do the missing work, continue after failures and interruptions, and refuse changed cells."""

from __future__ import annotations

import json
import shutil
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from safetensors.torch import load_file
from tiny_training import QUIET, assert_same, run_settings
from transformers import TrainerCallback

from pivotune.config.yaml_text import load_config
from pivotune.errors import UsageError
from pivotune.evaluation.prepare import EvaluationSettings
from pivotune.runs.execute import execute_run
from pivotune.runs.folder import write_run_config
from pivotune.runs.prepare import prepare_run
from pivotune.sweeps import run as module
from pivotune.sweeps.plan import parse_grid, plan_cells
from pivotune.sweeps.run import Sweep, describe_sweep, prepare_sweep, run_sweep
from pivotune.training import lens_fitting

LAYERS = "supervision.thinking.layer=2,3"
EVALUATED = {"seed": None, "max_new_tokens": None, "backend": "hf", "dtype": "auto"}


@pytest.fixture
def config(tmp_path):
    return write(tmp_path)


def write(folder, **training):
    settings = run_settings(folder)
    settings["training"] |= {"max_steps": 2, "save_strategy": "no", **training}
    settings["supervision"]["conversion"] = {"layer": 1}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def prepare(config, *grid, seeds=(0,), changes=(), tasks=(), languages=(), **settings):
    folder = config.parent / "sweep"
    cells = plan_cells(config, changes, parse_grid(grid), seeds=seeds, folder=folder)
    return prepare_sweep(config, folder, cells, tasks, EvaluationSettings(**settings), languages)


def run(sweep, **options):
    """Return failures and announced lines."""
    lines = []
    failures = run_sweep(sweep, announce=lines.append, **options)
    return failures, lines


def states(sweep):
    return [sweep.state(cell) for cell in sweep.cells]


def trained_weights(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture
def trainings(monkeypatch):
    """Replace training by files; return the list of (folder name, resumed, held-out scores given)."""
    seen = []

    def pretend(prepared, **options):
        seen.append((prepared.folder.name, options["resume"], options["before"] is not None))
        write_run_config(prepared.folder, prepared.config)
        (prepared.folder / "model").mkdir()
        tasks = {name: {"metric": "nll", "value": 1.0} for name in ("heldout_sw", "heldout_en")}
        (prepared.folder / "results.json").write_text(json.dumps({"model": prepared.config.model, "tasks": tasks}))
        return SimpleNamespace(before={})

    monkeypatch.setattr(module, "execute_run", pretend)
    return seen


@pytest.fixture
def evaluations(monkeypatch):
    """Replace evaluation: the value of every task is the number of items; return the requests."""
    seen = []

    def prepare_evaluation(model, tasks, settings, languages=()):
        names = [f"{task}_{languages[0]}" if languages and "_" not in task else task for task in tasks]
        if "xquad_xx" in names:
            raise UsageError("--tasks: XQuAD has no language 'xx'")
        return SimpleNamespace(
            model=str(model), settings=settings, tasks=[SimpleNamespace(task=SimpleNamespace(name=n)) for n in names]
        )

    def execute_evaluation(prepared, out, *, progress=None):
        for task in prepared.tasks:
            name = task.task.name
            seen.append((out.name, name))
            path = out / "results.json"
            results = json.loads(path.read_text()) if path.exists() else {"model": prepared.model, "tasks": {}}
            results["tasks"][name] = {
                "metric": "f1",
                "value": float(prepared.settings.limit or 100),
                "split": "test",
                "settings": {**EVALUATED, "limit": prepared.settings.limit},
            }
            out.mkdir(exist_ok=True)
            path.write_text(json.dumps(results))
            if seen.count((out.name, name)) == 1 and name == "fails_once":
                raise RuntimeError("the device is lost")
        seen_settings.append(prepared.settings)

    seen_settings = []
    monkeypatch.setattr(module, "prepare_evaluation", prepare_evaluation)
    monkeypatch.setattr(module, "execute_evaluation", execute_evaluation)
    return SimpleNamespace(asked=seen, settings=seen_settings)


# ---- training ----


def test_cells_are_ordinary_runs_and_equal_to_them(config, tmp_path):
    sweep = prepare(config, LAYERS, seeds=[0, 1])
    failures, lines = run(sweep)
    assert failures == {}
    assert lines[0] == "[1/4] thinking.layer=2,seed=0: to train"
    assert states(sweep) == ["done"] * 4
    for cell in sweep.cells:
        saved = yaml.safe_load((cell.folder / "config.yaml").read_text())
        assert saved["training"] | QUIET == saved["training"]
        assert saved["supervision"]["thinking"]["layer"] == cell.config.supervision.thinking.layer
    for cell in sweep.cells[1:3]:
        alone = load_config(
            config, [*cell.options[0].changes, f"seed={cell.seed}", f"output_dir={tmp_path / cell.name}"]
        )
        execute_run(prepare_run(alone))
        assert_same(trained_weights(cell.folder), trained_weights(tmp_path / cell.name))
        results = [json.loads((folder / "results.json").read_text()) for folder in (cell.folder, tmp_path / cell.name)]
        assert results[0] == results[1]


def test_starting_model_is_scored_once_for_the_same_held_out_rows(config, trainings):
    run(prepare(config, "method=tft,deep-supervision", seeds=[0, 1]))
    assert trainings == [
        ("method=tft,seed=0", False, False),
        ("method=deep-supervision,seed=0", False, True),
        ("method=tft,seed=1", False, False),
        ("method=deep-supervision,seed=1", False, True),
    ]


@pytest.mark.parametrize("change", ["data.template=alpaca,chat", "data.max_prompt_tokens=20,30", "method=sft,tft"])
def test_other_held_out_rows_are_scored_again(config, trainings, change):
    run(prepare(config, change))
    assert [given for _, _, given in trainings] == [False, False]


def test_finished_cells_are_kept_and_new_ones_added(config, trainings):
    run(prepare(config, "supervision.thinking.layer=2", seeds=[0]))
    trainings.clear()
    sweep = prepare(config, LAYERS, seeds=[0])
    assert states(sweep) == ["done", "to train"]
    _, lines = run(sweep)
    assert lines == ["[1/2] thinking.layer=2,seed=0: done", "[2/2] thinking.layer=3,seed=0: to train"]
    assert [name for name, *_ in trainings] == ["thinking.layer=3,seed=0"]


class _StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.exhaustive
def test_interrupted_cell_goes_on_from_its_checkpoint_to_the_same_weights(tmp_path):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    configs = [
        write(tmp_path / name, max_steps=4, save_strategy="steps", save_steps=2) for name in ("whole", "stopped")
    ]
    run(prepare(configs[0], LAYERS))
    sweep = prepare(configs[1], LAYERS)

    @contextmanager
    def watch(title):
        assert title == "Training"
        yield _StopAt(3)

    with pytest.raises(KeyboardInterrupt):
        run(sweep, watch=watch)
    assert states(sweep) == ["to go on from checkpoint-2", "to train"]
    _, lines = run(prepare(configs[1], LAYERS))
    names = [cell.name for cell in sweep.cells]
    assert lines == [f"[1/2] {names[0]}: to go on from checkpoint-2", f"[2/2] {names[1]}: to train"]
    for cell in sweep.cells:
        assert_same(trained_weights(cell.folder), trained_weights(tmp_path / "whole" / "sweep" / cell.name))


def test_a_cell_that_failed_before_its_first_step_may_be_corrected(config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("pivotune.runs.execute.load_model", lambda *args, **kwargs: 1 / 0)
        failures, _ = run(prepare(config, LAYERS))
    assert set(failures) == {cell.name for cell in prepare(config, LAYERS).cells}
    corrected = prepare(config, LAYERS, "training.learning_rate=1e-4")
    assert states(corrected) == ["to train", "to train"]
    assert run(corrected)[0] == {}


def test_cell_without_a_checkpoint_starts_again(config):
    sweep = prepare(config, LAYERS)

    @contextmanager
    def watch(title):
        yield _StopAt(1)

    with pytest.raises(KeyboardInterrupt):
        run(sweep, watch=watch)
    assert states(sweep) == ["to train again from the start", "to train"]
    failures, _ = run(prepare(config, LAYERS))
    assert (failures, states(sweep)) == ({}, ["done", "done"])


def test_a_failing_cell_costs_only_itself_and_is_tried_again(config, monkeypatch):
    sweep = prepare(config, LAYERS, "method=deep-supervision")
    broken = sweep.cells[0].name

    def out_of_memory(prepared, **options):
        if prepared.folder.name == broken:
            raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB")
        return execute_run(prepared, **options)

    monkeypatch.setattr(module, "execute_run", out_of_memory)
    failures, lines = run(sweep)
    assert failures == {broken: "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"}
    log = sweep.folder / f"{broken}.error.txt"
    assert lines[1] == f"{broken} failed: {failures[broken]} (traceback in {log})"
    assert "in out_of_memory" in log.read_text()
    record = json.loads((sweep.folder / "sweep.json").read_text())["cells"]
    assert [(cell["state"], cell["error"]) for cell in record] == [("failed", failures[broken]), ("done", None)]
    monkeypatch.setattr(module, "execute_run", execute_run)
    assert run(prepare(config, LAYERS, "method=deep-supervision"))[0] == {}
    assert not log.exists()


@pytest.mark.exhaustive
def test_a_cell_whose_checkpoints_are_damaged_fails_alone(tmp_path):
    config = write(tmp_path, save_strategy="steps", save_steps=1)
    first, second = (cell.folder for cell in prepare(config, LAYERS).cells)
    run(prepare(config, LAYERS))
    for path in (first, second):
        shutil.rmtree(path / "model")
    for path in first.glob("checkpoint-*"):
        (path / "model.safetensors").write_bytes(b"")
    half = second / ".saving" / "checkpoint-2.old"
    half.parent.mkdir()
    (second / "checkpoint-2").rename(half)
    sweep = prepare(config, LAYERS)
    # Nothing is written before the sweep begins.
    assert half.is_dir()
    failures, _ = run(sweep)
    assert list(failures) == [first.name]
    assert "no checkpoint is whole" in failures[first.name]
    assert failures[first.name].endswith("remove them and give the same command to start from the beginning")
    for path in first.glob("checkpoint-*"):
        shutil.rmtree(path)
    assert run(prepare(config, LAYERS))[0] == {}
    assert states(sweep) == ["done", "done"]


def test_a_diverging_cell_is_reported(config):
    sweep = prepare(config, "training.learning_rate=1e30,1e-3", changes=["training.max_steps=4", "method=tft"])
    failures, _ = run(sweep)
    assert list(failures) == ["learning_rate=1e30,seed=0"]
    assert failures["learning_rate=1e30,seed=0"].startswith("TrainingDivergedError: ")
    assert states(sweep)[1] == "done"


def test_models_are_freed_before_the_next_cell(config, monkeypatch):
    alive = []

    def spy(prepared, **options):
        assert [model for model in alive if model() is not None] == []
        result = execute_run(prepared, **options)
        alive.append(weakref.ref(result.model))
        return result

    monkeypatch.setattr(module, "execute_run", spy)
    failures, _ = run(prepare(config, "method=tft,sft,deep-supervision"))
    assert (failures, len(alive)) == ({}, 3)


# ---- checks ----


def test_everything_is_checked_before_anything_is_written(config):
    with pytest.raises(UsageError, match=r"supervision.thinking.layer: 9 is not allowed; the model has 4 layers"):
        prepare(config, "supervision.thinking.layer=2,9")
    with pytest.raises(UsageError, match=r"unknown key training.learning_rat; did you mean"):
        prepare(config, "method=tft,deep-supervision", changes=["training.learning_rat=1"])
    with pytest.raises(UsageError, match=r"missing\.jsonl"):
        prepare(config, f"data.train={config.parent / 'rows.jsonl'},missing.jsonl")
    assert not (config.parent / "sweep").exists()


def test_data_of_every_kind_of_cell_is_checked(config):
    rows = config.parent / "rows.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    rows.write_text("".join(json.dumps({"prompt": r["prompt"], "completion": r["completion"]}) + "\n" for r in lines))
    changes = ["data.english_ratio=0"]
    assert len(prepare(config, "method=tft", changes=changes).cells) == 1
    with pytest.raises(UsageError, match="method deep-supervision"):
        prepare(config, "method=tft,deep-supervision", changes=changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["training.max_steps=3"], "training.max_steps is 3 here and was 2 in "),
        (["data.limit=12"], "data.limit is 12 here and was None in "),
        (["supervision.conversion.weight=0.5"], "supervision.conversion.weight is 0.5 here and was 0.3 in "),
    ],
)
def test_changed_configuration_of_an_earlier_cell_is_refused(config, trainings, changes, message):
    sweep = prepare(config, "supervision.thinking.layer=2")
    run(sweep)
    with pytest.raises(UsageError) as error:
        prepare(config, LAYERS, changes=changes)
    assert str(error.value).startswith(message + str(sweep.cells[0].folder))
    assert prepare(config, LAYERS).cells[0] == sweep.cells[0]


def test_changed_data_of_a_trained_cell_are_refused(config):
    sweep = prepare(config, "supervision.thinking.layer=2")
    run(sweep)
    path = Path(sweep.cells[0].config.data.train)
    lines = path.read_text()
    path.write_text(lines.replace("Namba", "Nambari", 1))
    with pytest.raises(UsageError) as error:
        prepare(config, LAYERS)
    folder = sweep.cells[0].folder
    assert str(error.value).startswith(
        f"data.train: {path} is not what {folder} was trained with; choose another --out"
    )
    path.write_text(lines)
    assert prepare(config, LAYERS).state(sweep.cells[0]) == "done"


def test_a_changed_file_among_several_is_refused(config):
    rows = config.parent / "rows.jsonl"
    other = config.parent / "other.jsonl"
    other.write_text(rows.read_text().replace("Namba", "Nambari"))
    changes = [f"data.train=[{rows}, {{path: {other}, weight: 0.5}}]"]
    sweep = prepare(config, "supervision.thinking.layer=2", changes=changes)
    run(sweep)
    folder = sweep.cells[0].folder
    other.write_text(other.read_text().replace("Nambari", "Namba", 1))
    with pytest.raises(UsageError) as error:
        prepare(config, LAYERS, changes=changes)
    assert str(error.value).startswith(f"data.train.1.path: {other} is not what {folder} was trained with")
    with pytest.raises(UsageError, match=r"^data.train is .*'weight': 2.0.* here and was .*'weight': 0.5.* in "):
        prepare(config, LAYERS, changes=[changes[0].replace("0.5", "2")])


def test_folders_that_are_no_sweeps_are_refused(config):
    folder = config.parent / "sweep"
    folder.mkdir()
    assert prepare(config, LAYERS).folder == folder
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match=r"--out: .*sweep is not empty and not a sweep; choose another folder"):
        prepare(config, LAYERS)
    (folder / "thesis.tex").unlink()
    folder.rmdir()
    folder.write_text("a file")
    with pytest.raises(UsageError, match=r"--out: .*sweep is a file; name a folder"):
        prepare(config, LAYERS)


# ---- evaluation ----


def test_every_cell_and_the_starting_model_are_evaluated_once(config, evaluations, trainings):
    sweep = prepare(config, LAYERS, tasks=["xquad", "xnli_en"], limit=4)
    assert sweep.tasks == ("xquad_sw", "xnli_en")
    assert run(sweep)[0] == {}
    folders = ["base", *(cell.name for cell in sweep.cells)]
    assert evaluations.asked == [(folder, task) for folder in folders for task in sweep.tasks]
    assert [settings.cache.parent.name for settings in evaluations.settings] == folders
    assert states(sweep) == ["done", "done"]
    record = describe_sweep(sweep, {})
    assert record["tasks"] == ["xquad_sw", "xnli_en"]
    assert record["base"] == {"base": {"model": str(config.parent / "base"), "error": None}}
    evaluations.asked.clear()
    _, lines = run(prepare(config, LAYERS, tasks=["xquad", "xnli_en"], limit=4))
    assert evaluations.asked == []
    assert lines[0] == "base: done"


def test_only_missing_tasks_are_evaluated(config, evaluations, trainings):
    run(prepare(config, "method=tft", tasks=["xquad"]))
    evaluations.asked.clear()
    sweep = prepare(config, "method=tft", tasks=["xquad", "xnli_en"])
    assert states(sweep) == ["trained; to evaluate: xnli_en"]
    run(sweep)
    assert evaluations.asked == [("base", "xnli_en"), ("method=tft,seed=0", "xnli_en")]


def test_tasks_measured_with_other_settings_are_measured_again(config, evaluations, trainings):
    run(prepare(config, "method=tft", tasks=["xquad"], limit=4))
    sweep = prepare(config, "method=tft", tasks=["xquad"])
    assert states(sweep) == ["trained; to evaluate: xquad_sw"]
    run(sweep)
    entry = json.loads((sweep.cells[0].folder / "results.json").read_text())["tasks"]
    assert entry["xquad_sw"]["value"] == 100
    assert set(entry) == {"xquad_sw", "heldout_sw", "heldout_en"}
    assert states(prepare(config, "method=tft", tasks=["xquad"], split="test")) == ["done"]
    assert states(prepare(config, "method=tft", tasks=["xquad"], split="validation")) != ["done"]


def test_languages_may_be_given(config, evaluations):
    assert prepare(config, LAYERS, tasks=["xquad"], languages=["de"]).tasks == ("xquad_de",)


def test_wrong_task_is_refused_before_training(config, evaluations):
    with pytest.raises(UsageError, match="has no language 'xx'"):
        prepare(config, LAYERS, tasks=["xquad_xx"])
    assert not (config.parent / "sweep").exists()


def test_starting_models_are_asked_as_their_cells_are(config, evaluations, trainings):
    sweep = prepare(config, "data.template=alpaca,chat", tasks=["xnli_en"])
    run(sweep)
    assert [folder for folder, _ in evaluations.asked[:2]] == ["base", "base-2"]
    assert [settings.template for settings in evaluations.settings] == ["alpaca", "chat", None, None]


def test_failed_evaluation_leaves_the_training(config, evaluations, trainings):
    sweep = prepare(config, "method=tft", tasks=["fails_once"])
    failures, _ = run(sweep)
    assert failures == dict.fromkeys(("base", "method=tft,seed=0"), "RuntimeError: the device is lost")
    (sweep.cells[0].folder / "results.json").write_text(json.dumps({"tasks": {}}))
    trainings.clear()
    assert run(prepare(config, "method=tft", tasks=["fails_once"]))[0] == {}
    assert trainings == []


def test_lost_results_are_measured_again_without_training(config, evaluations, trainings):
    run(prepare(config, "method=tft", tasks=["xquad"]))
    trainings.clear()
    sweep = prepare(config, "method=tft", tasks=["xquad"])
    (sweep.cells[0].folder / "results.json").unlink()
    assert states(sweep) == ["trained; to evaluate: xquad_sw"]
    run(sweep)
    assert (trainings, states(sweep)) == ([], ["done"])


def test_broken_results_are_named(config, evaluations, trainings):
    sweep = prepare(config, "method=tft", tasks=["xquad"])
    run(sweep)
    path = sweep.cells[0].folder / "results.json"
    path.write_text("{")
    with pytest.raises(UsageError, match=r"results\.json: not valid JSON"):
        states(sweep)


def test_a_split_is_known_by_what_was_typed_and_by_its_own_name(tmp_path):
    """FLORES calls its test split `devtest`: a cell measured with `--split test` is done."""
    settings = {"limit": None, "seed": None, "split": "test", "max_new_tokens": None, "backend": "hf", "dtype": "auto"}
    entry = {"value": 1.0, "split": "devtest", "settings": settings}
    (tmp_path / "results.json").write_text(json.dumps({"tasks": {"flores_en-vi": entry}}))

    def missing(split):
        options = {"source": tmp_path, "folder": tmp_path, "cells": (), "tasks": ("flores_en-vi",), "bases": {}}
        return Sweep(**options, settings=EvaluationSettings(split=split)).missing(tmp_path)

    assert missing("test") == missing("devtest") == ()
    assert missing("dev") == missing(None) == ("flores_en-vi",)


def test_cells_share_a_fitted_lens(config, monkeypatch):
    fits = []
    fit = lens_fitting.fit_lens
    monkeypatch.setattr(lens_fitting, "fit_lens", lambda *args, **options: fits.append(1) or fit(*args, **options))
    tuned = ["supervision.lens=tuned", "supervision.tuned={states: 200, steps: 2}", "data.validation=2"]
    grid = "supervision.thinking.weight=0.1,0.2"
    sweep = prepare(config, grid, "supervision.thinking.layer=2,3", changes=tuned)
    assert run(sweep)[0] == {}
    # Layers 1 and 2, then 3.
    assert len(fits) == 2
    assert [len(lens_fitting.read_lens_figures(cell.folder / "lens.safetensors")) for cell in sweep.cells] == [
        2,
        3,
        3,
        3,
    ]
