from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from result_folders import NLL, records, write_items, write_run

from pivotune.cli.main import main

QUICK = ["--resamples", "1000"]


@pytest.fixture
def sweep(tmp_path):
    """Write a folder of runs (two methods, three seeds each, two tasks) and an evaluated base model beside it."""
    random = np.random.default_rng(0)
    base = random.random(80)

    def write(folder, shift, **options):
        tasks = {
            task: records((base + sign * shift + 0.02 * random.standard_normal(80)).tolist())
            for task, sign in (("xquad_vi", 1), ("xquad_en", -1))
        }
        write_run(folder, tasks, **options)

    for method, shift in (("tft", 0.0), ("deep-supervision", 0.3)):
        for seed in range(3):
            wobble = 0.01 * float(random.standard_normal())
            write(tmp_path / "sweep" / f"{method}-{seed}", shift + wobble, method=method, seed=seed)
    write(tmp_path / "base", -0.2, method=None, seed=None)
    return tmp_path / "sweep"


def compare(*words) -> int:
    return main(["compare", *map(str, words), *QUICK])


def one_error(capsys, *words) -> str:
    assert compare(*words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_folder_of_runs(sweep, capsys):
    assert compare(sweep, sweep.parent / "base") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].strip() == "xquad  f1 ↑"
    for text in (
        "deep-supervision",
        "baseline, 3 seeds",
        "base",
        "n 80",
        "▲",
        "▼",
        "covers items and",
        "Differences are to tft",
    ):
        assert text in out
    assert "harm to English" not in out


def test_json_is_all_there_is_on_stdout(sweep, capsys):
    assert compare(sweep, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert [row["seeds"] for row in content["rows"]] == [[0, 1, 2], [0, 1, 2]]
    verdicts = {cell["task"]: cell["difference"]["verdict"] for cell in content["cells"] if cell["difference"]}
    assert verdicts == {"xquad_vi": "better", "xquad_en": "worse"}
    assert compare(sweep, "--format", "json") == 0
    assert json.loads(capsys.readouterr().out) == content


@pytest.mark.parametrize(
    ("form", "start"), [("markdown", "| method | xquad vi"), ("latex", "% needs"), ("csv", "row,kind,method")]
)
def test_other_formats_on_stdout(sweep, capsys, form, start):
    assert compare(sweep, "--format", form) == 0
    assert capsys.readouterr().out.startswith(start)


def test_files(sweep, tmp_path, capsys):
    paths = [tmp_path / f"table{suffix}" for suffix in (".md", ".csv", ".tex", ".json")]
    words = [word for path in paths for word in ("--out", path)]
    assert compare(sweep, *words) == 0
    capsys.readouterr()
    assert [path.read_text(encoding="utf-8")[:7] for path in paths] == ["| metho", "row,kin", "% needs", '{\n  "ba']
    first = paths[0].read_bytes()
    assert f"--out: {paths[0]} exists; add --overwrite" in one_error(capsys, sweep, *words)
    assert compare(sweep, *words, "--overwrite") == 0
    assert paths[0].read_bytes() == first


def test_chosen_tasks_metrics_names_and_baseline(sweep, capsys):
    assert compare(
        sweep, sweep.parent / "base", "--tasks", "xquad_v*", "--metrics", "f1", "--names", "ours,plain,start",
        "--baseline", sweep.parent / "base", "--json",
    ) == 0  # fmt: skip
    content = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in content["rows"]] == ["ours", "plain", "start"]
    assert content["baseline"] == "start"
    assert {cell["task"] for cell in content["cells"]} == {"xquad_vi", "xquad_en"}


def test_a_baseline_that_is_no_run_given_is_added(sweep, capsys):
    assert compare(sweep / "deep-supervision-0", "--baseline", sweep.parent / "base", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in content["rows"]] == ["base", "deep-supervision-0"]
    assert content["baseline"] == "base"
    assert compare(sweep, "--baseline", "deep-supervision", "--json") == 0
    assert json.loads(capsys.readouterr().out)["baseline"] == "deep-supervision"


def test_results_files(sweep, capsys):
    assert compare(sweep / "tft-0" / "results.json", sweep / "deep-supervision-0" / "results.json", "--json") == 0
    assert [row["label"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["tft-0", "deep-supervision-0"]


def test_without_items_the_figures_stay(sweep, capsys):
    (sweep / "tft-1" / "results.items.jsonl.gz").write_bytes(b"\x1f\x8b broken")
    assert compare(sweep) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "warning: " in out
    assert "no usable items" in out
    assert "▲" not in out


def test_control_characters_in_names_do_not_reach_the_terminal(sweep, capsys):
    assert compare(sweep, "--names", "\x1b[2Jours,plain") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "␛[2Jours" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "html"], "--format: 'html' found; allowed: terminal, markdown, latex, csv, json"),
        (["--out", "table.html"], "--out: table.html ends in '.html'; allowed: .md, .tex, .csv, .json"),
        (["--out", "/dev/null/table.md"], "--out: /dev/null/table.md cannot be written (Not a directory)"),
        (["--names", "one"], "--names: 1 names for 2 rows (deep-supervision, tft)"),
        (["--names", "a,a"], "--names: a, a: every row needs a different name"),
        (["--tasks", "mkqa"], "--tasks: nothing matches 'mkqa'; the runs have: xquad_vi, xquad_en"),
        (["--metrics", "bleu"], "--metrics: nothing matches 'bleu'; the runs have: f1"),
        (["--baseline", "nothing"], "nothing is neither a file, a folder nor a row; the rows are: deep-supervision, tft"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(sweep, capsys, words, message):
    assert message in one_error(capsys, sweep, *words)


def test_results_are_never_overwritten(sweep, capsys):
    path = sweep / "tft-0" / "results.json"
    assert "holds results that are compared" in one_error(capsys, sweep, "--out", path, "--overwrite")


def test_no_runs(tmp_path, capsys):
    assert f"{tmp_path / 'gone'}: no such file or folder" in one_error(capsys, tmp_path / "gone")
    assert main(["compare"]) == 2
    assert "Missing argument" in capsys.readouterr().err


def test_training_results_by_held_out_rows_of_each_seed(tmp_path, capsys):
    """Each seed holds out its own rows, which are paired within a seed."""
    random = np.random.default_rng(1)
    for seed in range(3):
        tokens = random.integers(5, 40, 60)
        hard = random.gamma(tokens * 2.0)
        for method, gain in (("tft", 0.0), ("deep-supervision", -0.2)):
            items = [
                {"item": 1000 * seed + i, "gold_nll": float(nll + gain * t), "gold_tokens": int(t)}
                for i, (nll, t) in enumerate(zip(hard, tokens, strict=True))
            ]
            write_run(tmp_path / f"{method}-{seed}", {"heldout_vi": items}, metrics=(NLL,), method=method, seed=seed)
    assert compare(tmp_path, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["warnings"] == []
    (found,) = [cell["difference"] for cell in content["cells"] if cell["difference"]]
    assert (found["verdict"], found["n"], found["covers"]) == ("better", 60, "items and seeds")
    assert found["value"] == pytest.approx(-0.2)
    assert any("harm to English was not measured" in note for note in content["notes"])


def test_as_a_program_it_is_quick_and_loads_no_torch(sweep):
    script = (
        "import sys; from pivotune.cli.main import main; code = main(sys.argv[1:]); print('torch' in sys.modules, code)"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, "compare", str(sweep), *QUICK], capture_output=True, text=True
    )
    assert result.stdout.splitlines()[-1] == "False 0"
    assert result.stderr == ""


def test_items_of_another_evaluation_are_not_used(sweep, capsys):
    write_items(sweep / "deep-supervision-0" / "results.items.jsonl.gz", {"xquad_vi": records([0.5] * 80)})
    assert compare(sweep, "--tasks", "xquad_vi", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert any("its items give 50" in line for line in content["warnings"])
