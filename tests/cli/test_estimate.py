from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_config
from tiny_training import run_settings

from pivotune.cli.estimate import parse_bytes
from pivotune.cli.main import main
from pivotune.errors import UsageError

SMALL = {"training": {"per_device_train_batch_size": 4, "max_steps": 2, "use_cpu": True}}


def run_file(folder: Path, **changes) -> str:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**run_settings(folder), **SMALL, **changes}))
    return str(path)


def estimated(capsys, *arguments: str) -> dict:
    assert main(["estimate", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_for_one_device(tmp_path, capsys):
    found = estimated(capsys, run_file(tmp_path), "--rows", "16")
    (single,) = found["strategies"]
    assert found["parameters"]["total"] == found["parameters"]["trained"] > 0
    # The weights hold a few buffers that are not trained.
    assert single["memory"]["optimizer"] == 2 * single["memory"]["gradients"]
    assert single["schedule"]["steps"] == 2
    assert single["fits"] is True
    assert single["seconds"] > 0
    assert not (tmp_path / "run").exists()


def test_a_moving_average_takes_memory_and_whole_weights(tmp_path, capsys):
    gpus = ("--gpus", "2", "--gpu-memory", "1GiB", "--tflops", "100", "--rows", "16")
    plain = estimated(capsys, run_file(tmp_path), *gpus)
    averaged = estimated(capsys, run_file(tmp_path, ema=0.9), *gpus)
    (before,) = (item for item in plain["strategies"] if item["strategy"] == "ddp")
    (ddp,) = (item for item in averaged["strategies"] if item.get("memory"))
    assert ddp["strategy"] == "ddp"
    more = ddp["memory"]["optimizer"] - before["memory"]["optimizer"]
    assert more == 4 * plain["parameters"]["trained"]


def test_a_config_json_alone_will_do(tmp_path, capsys):
    """No weights, no tokenizer, no rows: typical lengths are assumed, and all strategies compared."""
    tiny_config("gemma2").save_pretrained(tmp_path / "bare")
    file = run_file(tmp_path, model=str(tmp_path / "bare"), data={"train": "owner/name"})
    found = estimated(capsys, file, "--gpus", "4", "--gpu-memory", "1GiB", "--tflops", "100", "--rows", "1000")
    assert [item["strategy"] for item in found["strategies"]] == ["ddp", "fsdp2", "zero2", "zero3"]
    assert found["lengths_assumed"] is True
    assert all(item["schedule"]["rows_per_step"] == 16 for item in found["strategies"])


def test_what_would_make_it_fit(tmp_path, capsys):
    """Every change that is named is one that the estimate itself calls enough."""
    # Each of about ten estimates is a dry step: without inner losses it is one pass.
    file = run_file(tmp_path, method="tft")
    whole = estimated(capsys, file)["strategies"][0]["memory"]["peak"]
    memory = f"{whole * 0.8 / 2**20:.3f}MiB"
    found = estimated(capsys, file, "--set", "training.bf16=false", "--gpu-memory", memory)
    assert found["strategies"][0]["fits"] is False
    assert "training.gradient_checkpointing=true" in found["changes_that_fit"]
    again = estimated(
        capsys, file, "--set", "training.bf16=false", "--gpu-memory", memory,
        "--set", "training.gradient_checkpointing=true",
    )  # fmt: skip
    assert again["strategies"][0]["fits"] is True


def test_table_for_a_person(tmp_path, capsys):
    assert main(["estimate", run_file(tmp_path)]) == 0
    out = capsys.readouterr().out
    for words in ("full fine-tuning", "4 rows x 1 accumulated x 1 process = 4 rows a step, 2 steps", "peak", "fits"):
        assert words in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--strategy", "fsdp"], "--strategy: 'fsdp' found; allowed: ddp, fsdp2, zero2, zero3"),
        (["--gpu-memory", "lots"], "--gpu-memory: 'lots' found; allowed: a size such as 80GiB"),
        (["--set", "training.optim=adam"], "training.optim: 'adam' is not allowed"),
        (["--set", "supervision.phase.steps=2"], "supervision.phase.steps: 2 is not below the run's 2 optimizer steps"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, options, words):
    assert main(["estimate", run_file(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_sizes():
    assert parse_bytes("80GiB") == parse_bytes("80 G") == parse_bytes("80gb") == 80 * 2**30
    assert parse_bytes("512MiB") == 2**29
    with pytest.raises(UsageError):
        parse_bytes("0GiB")


def test_train_says_what_it_trains(finished):
    printed = finished("tft", "method=tft").printed
    line = next(line for line in printed.splitlines() if line.startswith("training"))
    assert "parameters (full fine-tuning)" in line
    assert "4 rows x 1 accumulated x 1 process = 4 rows a step, 2 steps" in line


def test_an_estimate_that_fails_does_not_stop_the_run(tmp_path, capsys, monkeypatch):
    from pivotune.estimate import estimate as module

    def fail(*args, **kwargs):
        raise ValueError("no estimate")

    monkeypatch.setattr(module, "measure_model", fail)
    assert main(["train", run_file(tmp_path), "--set", "training.bf16=false"]) == 0
    assert "\ntraining " not in capsys.readouterr().out


def test_a_warning_where_memory_will_not_suffice(tmp_path, capsys, monkeypatch):
    from pivotune.estimate import estimate as module
    from pivotune.estimate.operations import Device

    monkeypatch.setattr(module, "_LEAST_PARAMETERS", 0)
    small = Device(kind="cpu", name="CPU", memory=2.0**20, rate=None)
    monkeypatch.setattr(module, "find_device", lambda **_: small)
    assert main(["train", run_file(tmp_path), "--set", "training.bf16=false"]) == 0
    out = capsys.readouterr().out
    assert "estimated peak" in out
    assert "will probably not suffice" in out


def test_out_of_memory_is_one_line_and_exit_code_1(tmp_path, capsys, monkeypatch):
    from pivotune.runs import execute as run

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nOf the allocated memory ...")

    monkeypatch.setattr(run.DeepSupervisionTrainer, "train", fail)
    assert main(["train", run_file(tmp_path), "--set", "training.bf16=false"]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pivotune:")]
    assert len(error) == 1
    assert "out of memory while training" in error[0]
    assert "training.per_device_train_batch_size=2 with training.gradient_accumulation_steps=2" in error[0]
