"""Compute the numbers of a layer sweep from the folders of finished cells."""

from __future__ import annotations

import json
import statistics

import pytest
import yaml

from pivotune.compare.layer_curve import layer_curve, swept_term
from pivotune.evaluation.prepare import EvaluationSettings
from pivotune.sweeps.plan import parse_grid, plan_cells
from pivotune.sweeps.run import Sweep, swept_runs

ENTROPY = [5.0, 3.0, 2.0, 2.0, 1.0]


def make_sweep(folder, *grid, seeds=(0,), tasks=("xquad_vi",), changes=()):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "data": {"train": "pairs.jsonl"}, "output_dir": "run"}))
    cells = plan_cells(path, changes, parse_grid(grid), seeds=seeds, folder=folder / "sweep")
    settings = EvaluationSettings()
    return Sweep(source=path, folder=folder / "sweep", cells=tuple(cells), tasks=tasks, bases={}, settings=settings)


def finish(cell, scores, layers=None):
    """Write the files of a trained and evaluated cell."""
    cell.folder.mkdir(parents=True)
    tasks = {
        name: {"metric": "f1", "value": value, "stderr": None if value is None else 0.5}
        for name, value in scores.items()
    }
    (cell.folder / "results.json").write_text(json.dumps({"model": "m", "tasks": tasks}))
    if cell.config.method == "deep-supervision":
        supervision = cell.config.supervision
        chosen = {term: getattr(supervision, term).layer for term in ("conversion", "thinking")} | (layers or {})
        profile = {"num_layers": 4, "tokens": 9, "sequences": 2, "entropy": ENTROPY}
        analysis = {"version": 1, "model": "m", "language": "vi", "num_layers": 4, "method": "explicit", "reason": ""}
        others = {"falls": [], "target": profile, "english": None, "english_tokens": None}
        (cell.folder / "layers.json").write_text(json.dumps({**analysis, **chosen, **others}))


def curve_of(sweep):
    return layer_curve(swept_runs(sweep), "thinking", sweep.tasks)


def layer_of(cell):
    return cell.config.supervision.thinking.layer


def test_one_seed_has_the_interval_over_items(tmp_path):
    sweep = make_sweep(tmp_path, "supervision.thinking.layer=3,2")
    for cell in sweep.cells:
        finish(cell, {"xquad_vi": 10.0 + layer_of(cell), "heldout_vi": 1.0})
    curve = curve_of(sweep)
    assert (curve["term"], curve["errors"]) == ("thinking", "items")
    assert curve["layers"]["target"]["entropy"] == ENTROPY
    (series,) = curve["series"]
    assert (series["label"], series["metric"], series["baseline"]) == ("xquad_vi", "f1", None)
    assert [(p["layer"], p["value"], p["seeds"]) for p in series["points"]] == [(2, 12.0, 1), (3, 13.0, 1)]
    assert [p["margin"] for p in series["points"]] == pytest.approx([0.98, 0.98])


def test_seeds_give_mean_and_standard_deviation(tmp_path):
    sweep = make_sweep(tmp_path, "supervision.thinking.layer=2,3", seeds=[0, 1, 2])
    values = {0: 10.0, 1: 11.0, 2: 13.0}
    for cell in sweep.cells:
        if (layer_of(cell), cell.seed) not in ((3, 1), (3, 2)):
            finish(cell, {"xquad_vi": values[cell.seed]})
    curve = curve_of(sweep)
    assert curve["errors"] == "seeds"
    complete, single = curve["series"][0]["points"]
    assert complete == {
        "layer": 2,
        "value": pytest.approx(34 / 3),
        "margin": pytest.approx(statistics.stdev(values.values())),
        "seeds": 3,
    }
    assert single == {"layer": 3, "value": 10.0, "margin": None, "seeds": 1}


def test_tft_is_the_baseline_of_every_task(tmp_path):
    sweep = make_sweep(
        tmp_path, "method=tft,deep-supervision", "supervision.thinking.layer=2,3", seeds=[0, 1], tasks=("a_vi", "b_en")
    )
    for cell in sweep.cells:
        base = 0.0 if cell.config.method == "tft" else 10.0
        finish(cell, {"a_vi": base + cell.seed, "b_en": base + 5 + cell.seed})
    curve = curve_of(sweep)
    assert [(one["label"], one["baseline"]) for one in curve["series"]] == [("a_vi", 0.5), ("b_en", 5.5)]


def test_what_else_is_varied_makes_lines_of_its_own_with_their_own_baseline(tmp_path):
    sweep = make_sweep(
        tmp_path, "method=tft,deep-supervision", "training.learning_rate=1e-4,1e-3", "supervision.thinking.layer=2,3"
    )
    for cell in sweep.cells:
        rate = cell.config.training["learning_rate"]
        finish(cell, {"xquad_vi": 1000 * rate if cell.config.method == "tft" else 50.0 + rate})
    found = {one["label"]: (one["baseline"], [p["value"] for p in one["points"]]) for one in
             curve_of(sweep)["series"]}  # fmt: skip
    assert found == {
        "xquad_vi, learning_rate=0.0001": (pytest.approx(0.1), [50.0001, 50.0001]),
        "xquad_vi, learning_rate=0.001": (pytest.approx(1.0), [50.001, 50.001]),
    }


def test_automatic_layers_stand_where_they_were_chosen(tmp_path):
    sweep = make_sweep(tmp_path, "supervision.thinking.layer=2,auto")
    for cell in sweep.cells:
        finish(cell, {"xquad_vi": 1.0}, layers=None if layer_of(cell) == 2 else {"thinking": 3})
    assert [point["layer"] for point in curve_of(sweep)["series"][0]["points"]] == [2, 3]


def test_unfinished_cells_and_undefined_values_are_left_out(tmp_path):
    sweep = make_sweep(tmp_path, "supervision.thinking.layer=1,2,3")
    finish(sweep.cells[0], {"xquad_vi": None})
    finish(sweep.cells[1], {"xquad_vi": 4.0})
    (series,) = curve_of(sweep)["series"]
    assert [point["layer"] for point in series["points"]] == [2]


def test_nothing_finished_is_an_empty_curve(tmp_path):
    curve = curve_of(make_sweep(tmp_path, "supervision.thinking.layer=1,2"))
    assert (curve["series"], curve["layers"]) == ([], None)


def test_without_tasks_the_held_out_rows_are_drawn(tmp_path):
    sweep = make_sweep(tmp_path, "supervision.thinking.layer=1,2", tasks=())
    for cell in sweep.cells:
        finish(cell, {"heldout_vi": 1.5, "heldout_en": 2.5})
    assert [one["label"] for one in curve_of(sweep)["series"]] == ["heldout_vi", "heldout_en"]


@pytest.mark.parametrize(
    ("grid", "term"),
    [
        (["supervision.thinking.layer=2,3"], "thinking"),
        (["supervision.conversion.layer=1,2"], "conversion"),
        (["supervision.conversion.layer=1,2", "supervision.thinking.layer=3,4"], "thinking"),
        (["supervision.conversion.layer=1,2", "supervision.thinking.layer=3"], "conversion"),
        (["supervision.thinking.layer=2,auto"], "thinking"),
        (["supervision.thinking.weight=0.1,1"], None),
    ],
)
def test_the_swept_term(tmp_path, grid, term):
    assert swept_term(swept_runs(make_sweep(tmp_path, *grid))) == term


def test_layers_that_were_chosen_for_other_seeds_and_languages_are_no_sweep(tmp_path):
    sweep = make_sweep(tmp_path, "data.language=vi,sw", seeds=[0, 1])
    for cell in sweep.cells:
        finish(cell, {"xquad_vi": 1.0}, layers={"thinking": 2 + cell.seed})
    assert swept_term(swept_runs(sweep)) is None
