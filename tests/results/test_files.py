from __future__ import annotations

import gzip
import json
import math
import re
import subprocess
import sys

import pytest
from result_folders import F1, NLL, change_results, entry, records, write_items, write_run

from pivotune.errors import UsageError
from pivotune.results.files import check_target, read_results, results_paths, write_results

VALUES = [0.0, 1.0, 0.5, 0.25]


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run", {"xquad_vi": records(VALUES), "xquad_en": records([1.0, 1.0, 0.5, 0.5])})


def items_of(folder) -> list[dict]:
    with gzip.open(folder / "results.items.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# ---- reading ----


def test_a_run_folder(folder):
    results = read_results(folder)
    assert (results.model, results.method, results.problems) == ("owner/base", "tft", [])
    task = results.tasks["xquad_vi"]
    assert (task.primary, task.benchmark, task.language) == ("f1", "xquad", "vi")
    assert task.conditions == {"split": "validation"}
    assert task.metrics["f1"].definition == F1
    assert (task.metrics["f1"].value, task.metrics["f1"].n) == (43.75, 4)
    assert results.items["xquad_vi"]["q0002"] == {"f1": 0.5}
    assert read_results(folder / "results.json") == results


def test_results_of_training_before_metrics_were_described(tmp_path):
    """Read the format of the first release."""
    task = {"metric": "nll", "value": 2.0, "stderr": 0.1, "n": 2, "higher_is_better": False, "nll_per_character": 1.0}
    (tmp_path / "results.json").write_text(json.dumps({"model": "m", "method": "tft", "tasks": {"heldout_sw": task}}))
    write_items(tmp_path / "results.items.jsonl.gz", {"heldout_sw": [{"item": 0, "nll": 4.0, "tokens": 2}]})
    results = read_results(tmp_path)
    read = results.tasks["heldout_sw"]
    assert (read.primary, read.benchmark, read.language) == ("nll", "heldout", "sw")
    figure = read.metrics["nll"]
    assert (figure.value, figure.stderr, figure.n) == (2.0, 0.1, 2)
    assert (figure.definition.form, figure.definition.fields) == ("ratio", ("nll", "tokens"))
    assert figure.definition.higher_is_better is False
    assert results.items["heldout_sw"] == {"0": {"nll": 4.0, "tokens": 2}}


def test_settings_become_conditions(tmp_path):
    changes = {
        "settings": {"limit": 40, "template": "chat"},
        "origin": ["a.json"],
        "versions": {"torch": "2"},
        "truncated": 3,
    }
    folder = write_run(tmp_path / "run", {"xquad_vi": records(VALUES)}, changes=changes)
    assert read_results(folder).tasks["xquad_vi"].conditions == {
        "split": "validation", "limit": 40, "template": "chat", "origin": ["a.json"], "versions.torch": "2",
    }  # fmt: skip


def test_texts_of_items_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run", {"t_vi": [{"item": "a", "f1": 1.0, "answer": "x" * 99, "counts": [1, 2]}]})
    assert read_results(folder).items["t_vi"]["a"] == {"f1": 1.0, "counts": [1, 2]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"results\.json: not valid JSON \(.*\)"),
        ("[1]", r"no results: expected keys model, method and tasks, found list"),
        ('{"settings": 1, "models": {}}', "found keys settings, models"),
        ('{"tasks": {"a_vi": 3}}', "task a_vi: expected an object with metric, value and n, found 3"),
        ('{"tasks": {"a_vi": {"metric": "f1", "value": "high"}}}', "metric f1: value is 'high'; a number or null"),
        (
            '{"tasks": {"a_vi": {"metric": "f1", "metrics": {"f1": {"form": "median"}}}}}',
            "form 'median' is not known; allowed: mean, ratio, chrf, bleu",
        ),
        ('{"tasks": {"a_vi": {"metric": "f1", "metrics": {"f1": {"form": "ratio", "fields": ["a"]}}}}}', "takes 2 name"),
        ('{"tasks": {"a_vi": {"metric": "f1", "higher_is_better": "yes"}}}', "higher_is_better 'yes' is not allowed"),
    ],
)  # fmt: skip
def test_faults_of_results_are_one_line(tmp_path, content, message):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_results(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_results(tmp_path):
    with pytest.raises(UsageError, match=r"results\.json: no such file; pivotune train and pivotune evaluate write it"):
        read_results(tmp_path)


def test_undefined_figures_are_none(folder):
    change_results(
        folder, lambda content: content["tasks"]["xquad_vi"]["metrics"]["f1"].update(value=math.nan, stderr=None)
    )
    figure = read_results(folder).tasks["xquad_vi"].metrics["f1"]
    assert (figure.value, figure.stderr) == (None, None)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-12])


def overwrite(content: bytes):
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: path.unlink(), "no such file: no intervals"),
        (truncate, "cannot be read after line .*: no intervals"),
        (overwrite(b"not gzip"), "cannot be read after line 0 .*Not a gzipped file"),
        (
            overwrite(gzip.compress(b'{"task": "xquad_vi"}\n')),
            "cannot be read after line 1 .*expected an object with task",
        ),
        (overwrite(gzip.compress(b'{"task": \n')), "cannot be read after line 1"),
        (overwrite(gzip.compress(b"\xff\xfe\n")), "cannot be read after line 0"),
    ],
)
def test_without_usable_items_there_are_figures_and_one_line(folder, damage, problem):
    damage(folder / "results.items.jsonl.gz")
    results = read_results(folder)
    assert results.tasks["xquad_vi"].metrics["f1"].value == 43.75
    assert results.items == {}
    (line,) = results.problems
    assert "results.items.jsonl.gz" in line
    assert re.search(problem, line)


@pytest.mark.parametrize(
    ("faulty", "problem"),
    [
        (
            [{"item": "a", "f1": 1.0}, {"item": "a", "f1": 0.0}],
            "line 2: item a of t_vi appears twice: no intervals for t_vi",
        ),
        ([{"item": "a", "f1": math.nan}], "line 1: f1 of item a of t_vi is not a finite number: no intervals for t_vi"),
        ([{"item": "a", "counts": [1, math.inf]}], "line 1: counts of item a of t_vi is not a finite number"),
    ],
)
def test_a_faulty_item_costs_its_task_only(folder, faulty, problem):
    write_items(folder / "results.items.jsonl.gz", {"t_vi": faulty, "xquad_en": records([1.0])})
    results = read_results(folder)
    assert set(results.items) == {"xquad_en"}
    (line,) = results.problems
    assert problem in line


# ---- writing ----


def test_earlier_tasks_stay_and_given_ones_are_replaced(folder):
    fresh = records([1.0, 1.0])
    written = write_results(
        folder, "elsewhere", None, {"xquad_vi": entry(fresh), "mlqa_vi": entry(fresh)},
        [{"task": name, **item} for name in ("xquad_vi", "mlqa_vi") for item in fresh],
    )  # fmt: skip
    results = read_results(folder)
    assert results.problems == []
    assert written == json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert {name: task.metrics["f1"].value for name, task in results.tasks.items()} == {
        "xquad_vi": 100.0, "xquad_en": 75.0, "mlqa_vi": 100.0,
    }  # fmt: skip
    assert {name: len(items) for name, items in results.items.items()} == {"xquad_vi": 2, "xquad_en": 4, "mlqa_vi": 2}
    # A run's results keep the model that training started from.
    assert (results.model, results.method) == ("owner/base", "tft")


def test_a_new_file_with_items_beside_it(tmp_path):
    target = tmp_path / "deep" / "base.json"
    write_results(
        target,
        "m",
        None,
        {"a_vi": entry(records([1.0]))},
        [{"task": "a_vi", "item": "q0000", "f1": 1.0, "answer": "né"}],
    )
    assert sorted(path.name for path in target.parent.iterdir()) == ["base.items.jsonl.gz", "base.json"]
    results = read_results(target)
    assert (results.model, results.method, results.problems) == ("m", None, [])
    with gzip.open(results_paths(target)[1], "rt", encoding="utf-8") as file:
        assert file.read() == '{"task": "a_vi", "item": "q0000", "f1": 1.0, "answer": "né"}\n'


def test_what_is_no_number_is_written_as_null(tmp_path):
    items = [{"task": "a_vi", "item": "0", "f1": math.nan}, {"task": "a_vi", "item": "1", "f1": 1.0}]
    write_results(tmp_path, "m", None, {"a_vi": {**entry(records([1.0])), "stderr": math.nan}}, items)
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert items_of(tmp_path)[0]["f1"] is None


def test_results_of_another_model_are_kept(tmp_path):
    target = tmp_path / "base.json"
    write_results(target, "one", None, {"a_vi": entry(records([1.0]))}, [])
    before = target.read_bytes()
    with pytest.raises(UsageError, match=r"base\.json: holds results of one; these are of two; write them elsewhere"):
        write_results(target, "two", None, {"a_vi": entry(records([0.0]))}, [])
    with pytest.raises(UsageError, match="holds results of one"):
        check_target(target, "two")
    check_target(target, "one")
    check_target(tmp_path / "new.json", "two")
    assert target.read_bytes() == before


def test_one_model_by_two_paths(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    write_results(tmp_path / "r.json", "model", None, {}, [])
    check_target(tmp_path / "r.json", str(tmp_path / "model"))


def test_broken_items_are_moved_aside(folder):
    path = folder / "results.items.jsonl.gz"
    truncate(path)
    damaged = path.read_bytes()
    write_results(folder, "m", None, {"a_vi": entry(records([1.0]))}, [{"task": "a_vi", "item": "0", "f1": 1.0}])
    assert (folder / "results.items.jsonl.gz.broken").read_bytes() == damaged
    assert items_of(folder) == [{"task": "a_vi", "item": "0", "f1": 1.0}]


def test_a_write_that_fails_leaves_everything_as_it_was(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def failing():
        yield {"task": "a_vi", "item": "0"}
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        write_results(folder, "m", None, {"a_vi": entry(records([1.0]))}, failing())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_results_file_that_is_none_is_not_replaced(tmp_path):
    path = tmp_path / "notes.json"
    path.write_text('{"my": "notes"}')
    with pytest.raises(UsageError, match="no results: expected keys"):
        write_results(path, "m", None, {}, [])
    assert path.read_text() == '{"my": "notes"}'


def test_metrics_come_back_as_they_were(tmp_path):
    items = [{"item": str(i), "gold_nll": 3.0 + i, "gold_tokens": 2} for i in range(4)]
    write_results(tmp_path, "m", None, {"a_vi": entry(items, (NLL,))}, [{"task": "a_vi", **item} for item in items])
    figure = read_results(tmp_path).tasks["a_vi"].metrics["nll_per_token"]
    assert figure.definition == NLL
    assert figure.value == pytest.approx(18 / 8)


def test_comparing_imports_no_torch():
    script = (
        "import sys; import pivotune.compare.comparison, pivotune.compare.formats; "
        "print([n for n in ('torch', 'transformers', 'lm_eval', 'sacrebleu') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
