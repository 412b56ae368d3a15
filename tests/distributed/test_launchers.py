"""torchrun and `accelerate launch` as a user types them, on this machine's CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_folders import metrics, write_run

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]
ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
# The file as it is, with what a machine without GPUs needs.
ACCELERATE = ("accelerate.commands.launch", "--config_file", str(ROOT / "configs" / "accelerate" / "ddp.yaml"), "--cpu",
              "--num_processes", "2")  # fmt: skip
PATIENCE = 300.0  # seconds; only a test that fails waits so long


def launch(launcher: tuple[str, ...], config: Path, *words: str, **env: str) -> subprocess.Popen:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src"), **env}
    command = [sys.executable, "-m", *launcher, "-m", "pivotune", "train", str(config), *words]
    with (config.parent / "log.txt").open("w") as log:
        return subprocess.Popen(
            command,
            env=settings,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def ended(process: subprocess.Popen, config: Path) -> tuple[int, str]:
    try:
        code = process.wait(PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code, (config.parent / "log.txt").read_text(errors="replace")


def test_accelerate_launch_as_typed(tmp_path):
    config = write_run(tmp_path, max_steps=2)
    code, text = ended(launch(ACCELERATE, config), config)
    assert code == 0, text
    assert text.count("rows to train on") == 1
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert metrics(tmp_path / "run")[-1]["step"] == 2


def test_sigusr1_to_torchrun_saves_and_the_same_command_goes_on(tmp_path):
    """As in the Slurm recipe: the launcher hands the signal on to its workers."""
    config = write_run(tmp_path, max_steps=5000, save_steps=10_000, eval_steps=10_000, logging_steps=1)
    process = launch(TORCHRUN, config, "--auto-resume", PET_SIGNALS_TO_HANDLE="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    lines, until = tmp_path / "run" / "metrics.jsonl", time.monotonic() + PATIENCE
    while not (lines.is_file() and lines.read_text().count("\n") > 2) and process.poll() is None:
        assert time.monotonic() < until, (tmp_path / "log.txt").read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    code, text = ended(process, config)
    assert code != 0
    saved = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    assert len(saved) == 1, text
    step = int(saved[0].removeprefix("checkpoint-"))
    assert f"pivotune: stopped by SIGUSR1: saved {tmp_path / 'run' / saved[0]}" in text
    code, text = ended(launch(TORCHRUN, config, "--auto-resume", "--set", f"training.max_steps={step + 1}"), config)
    assert code == 0, text
    assert f"resuming: {tmp_path / 'run' / saved[0]}" in text
    assert text.count("rows to train on") == 1
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert metrics(tmp_path / "run")[-1]["step"] == step + 1
