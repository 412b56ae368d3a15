"""`pivotune train` on two processes: the run of one process, and resumed by as many or by another number of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from process_pool import run_ranks
from run_folders import as_it_was_at_step_2, metrics, write_run
from safetensors.torch import load_file

from pivotune.cli.main import main

pytestmark = pytest.mark.slow
ENGINES = ("ddp", "fsdp2", "fsdp2-sharded")
# AdamW divides by the gradient's size: rounding of a tiny one moved a weight by 1.6e-5 in four steps at a rate of 0.01.
ROUNDED = 3e-5
# Two processes share micro-batches of 8 rows; one takes two of 4.
TWO, ONE = {"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


def assert_same_weights(one: Path, other: Path, tolerance: float) -> None:
    weights, expected = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_lines(one: Path, other: Path, tolerance: float) -> None:
    found, expected = metrics(one), metrics(other)
    assert len(found) == len(expected) > 4
    for line, right in zip(found, expected, strict=True):
        for name in [key for key in {*line, *right} if key.endswith(("gradient_share", "cosine"))]:
            # Of one micro-batch, which has fewer rows in two processes; not measured where weights are sharded.
            line.pop(name, None), right.pop(name, None)
        assert line == pytest.approx(right, rel=tolerance, abs=tolerance)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("single")
    path = write_run(folder, **ONE)
    assert main(["train", str(path), "--set", f"output_dir={folder / 'a'}"]) == 0
    return folder


@pytest.fixture(scope="module")
def finished(single, tmp_path_factory) -> dict[str, Any]:
    """Folder and printed texts of the runs of two processes, by engine; made when first asked for."""
    made: dict[str, Any] = {}

    def get(engine: str) -> tuple[Path, list[str]]:
        if engine not in made:
            folder = tmp_path_factory.mktemp(engine)
            write_run(folder, **TWO)
            if engine == "ddp":
                as_it_was_at_step_2(single / "a", folder / "c")
                for name in ("base", "rows.jsonl"):
                    # The same model and rows under the same names: a resumed run is held to its configuration.
                    _use(folder / "run.yaml", str(folder / name), str(single / name))
            texts = run_ranks(folder, program="worker:run_and_resume", arguments=[engine, str(folder)])
            made[engine] = folder, texts
        return made[engine]

    return get


def _use(path: Path, before: str, now: str) -> None:
    path.write_text(path.read_text().replace(before, now))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_run_is_that_of_one_process(engine, finished, single):
    folder, texts = finished(engine)
    assert_same_weights(folder / "a" / "model", single / "a" / "model", ROUNDED)
    assert_same_lines(folder / "a", single / "a", 1e-5)
    results = [json.loads((path / "a" / "results.json").read_text())["tasks"] for path in (folder, single)]
    assert results[0].keys() == results[1].keys() == {"heldout_sw", "heldout_en"}
    for name, task in results[0].items():
        assert task["n"] == results[1][name]["n"] == 4
        for found, expected in ((task, results[1][name]), (task["base"], results[1][name]["base"])):
            assert found["value"] == pytest.approx(expected["value"], rel=1e-5)
    # The first process speaks, and it alone.
    assert "rows to train on" in texts[0]
    assert "rows to train on" not in texts[1]


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_resume_two_bit_for_bit(engine, finished):
    folder, _ = finished(engine)
    assert_same_weights(folder / "b" / "model", folder / "a" / "model", 0.0)
    assert_same_lines(folder / "b", folder / "a", 0.0)
    assert (folder / "b" / "checkpoint-4" / "data_order.json").is_file()
    assert (folder / "b" / "checkpoint-4" / "checksums.json").is_file()
    assert not (folder / "b" / ".saving").exists()


def test_one_process_resumes_two(finished, single, tmp_path, capfd):
    folder, _ = finished("ddp")
    as_it_was_at_step_2(folder / "a", tmp_path / "run")
    assert main(["train", str(single / "run.yaml"), "--set", f"output_dir={tmp_path / 'run'}", "--resume"]) == 0
    assert_same_weights(tmp_path / "run" / "model", single / "a" / "model", ROUNDED)
    assert_same_lines(tmp_path / "run", single / "a", 1e-5)
    assert "4 x 1 accumulated x 2 processes" in capfd.readouterr().err


def test_two_processes_resume_one(finished, single):
    folder, texts = finished("ddp")
    assert_same_weights(folder / "c" / "model", single / "a" / "model", ROUNDED)
    assert_same_lines(folder / "c", single / "a", 1e-5)
    assert "4 x 2 accumulated x 1 processes" in texts[0]


def test_steps_of_other_rows_are_refused(finished, single, tmp_path, capfd):
    folder, _ = finished("ddp")
    as_it_was_at_step_2(folder / "a", tmp_path / "run")
    words = ["train", str(single / "run.yaml"), "--set", f"output_dir={tmp_path / 'run'}", "--resume"]
    assert main([*words, "--set", "training.gradient_accumulation_steps=1"]) == 2
    assert "set training.gradient_accumulation_steps=2" in capfd.readouterr().err
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2"]


def test_a_mistake_is_one_line_of_one_process(tmp_path):
    write_run(tmp_path)
    words = ["train", str(tmp_path / "run.yaml"), "--set", "data.train=nowhere.jsonl"]
    with pytest.raises(AssertionError, match=r"exit codes \[2, 2\]") as raised:
        run_ranks(tmp_path, arguments=words)
    assert str(raised.value).count("pivotune: error: nowhere.jsonl: no such file") == 1
