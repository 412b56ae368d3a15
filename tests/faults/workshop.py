"""A folder with a tiny model and rows, and real processes that train in it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import yaml
from rendezvous import Rendezvous
from tiny_training import QUIET, run_settings

from pivotune.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
TRAINING = {
    **QUIET,
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "logging_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
}
PATIENCE = 300.0  # seconds; only a test that fails waits so long


class Server:
    """Forks processes that have everything imported; see `server.py`.

    Attributes:
        shared: holds the starting model and the uninterrupted run, the same for all workshops.
    """

    def __enter__(self) -> Self:
        paths = [str(ROOT / "src"), str(ROOT / "tests"), *filter(None, sys.path)]
        settings = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **settings, "TOKENIZERS_PARALLELISM": "false"},
        )
        self._folder = tempfile.TemporaryDirectory()
        self.shared = Path(self._folder.name)
        return self

    def __exit__(self, *error: object) -> None:
        # Closes its pipes, at which it ends, and waits.
        self._process.__exit__(None, None, None)
        self._folder.cleanup()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


class Process:
    """One training; `code` is None while it runs."""

    def __init__(self, server: Server, log: Path, **request: Any) -> None:
        self._server, self._log = server, log
        self.pid = server.ask({"start": {"log": str(log), **request}})["pid"]
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self._server.ask({"poll": self.pid})["code"]
        return self.code

    def wait(self) -> int:
        wait_for(lambda: self.poll() is not None, "the process to end")
        assert self.code is not None
        return self.code

    def wait_for_marker(self, marker: Path) -> None:
        wait_for(lambda: marker.exists() or self.poll() is not None, str(marker))
        assert marker.exists(), f"the process ended with {self.code} before: {self.output}"

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def send_to_all(self, number: int) -> None:
        """To it and to the processes that it started, as Slurm and Kubernetes do."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            self.send_to_all(signal.SIGKILL)
            self.wait()

    @property
    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def last_line(self) -> str:
        return self.output.strip().splitlines()[-1] if self.output.strip() else ""


def wait_for(condition: Any, what: str) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, f"waited {PATIENCE:.0f} s for {what}"
        time.sleep(0.01)


class Workshop:
    """Runs of one configuration, each in its own output folder."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.marker = folder / "marker"
        self.settings = run_settings(server.shared, training=TRAINING)
        # Rows of its own: a scenario changes them.
        shutil.copy(server.shared / "rows.jsonl", self.rows)
        self.settings["data"] = {**self.settings["data"], "train": str(self.rows)}
        self._logs = 0

    @property
    def rows(self) -> Path:
        return self.folder / "rows.jsonl"

    def start(self, run: str, *options: str, inject: dict[str, Any] | None = None, **changes: Any) -> Process:
        """Begin `pivotune train` in the output folder `run`."""
        config = self.write_config(run, **changes)
        return self.fork(arguments=["train", str(config), *options], faults=inject or {})

    def write_config(self, run: str, **changes: Any) -> Path:
        config = self.folder / f"{run}.yaml"
        settings = {**self.settings, "output_dir": str(self.folder / run), **changes}
        config.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return config

    def fork(self, **request: Any) -> Process:
        self._logs += 1
        return Process(self.server, self.folder / f"{self._logs}.log", **request)

    def fork_ranks(self, count: int, **request: Any) -> list[Process]:
        """Processes of one group."""
        self._rendezvous = Rendezvous(count)
        environments = [{**self._rendezvous.environment(rank), "ACCELERATE_USE_CPU": "true"} for rank in range(count)]
        return [self.fork(environment=environment, **request) for environment in environments]

    def run(self, run: str, *options: str, inject: dict[str, Any] | None = None, **changes: Any) -> Process:
        """The same, to its end."""
        process = self.start(run, *options, inject=inject, **changes)
        process.wait()
        return process

    def whole(self) -> Path:
        """The uninterrupted run that others are compared with."""
        whole = self.server.shared / "whole"
        if not whole.exists():
            process = self.run("whole", output_dir=str(whole))
            assert process.code == 0, process.output
        return whole

    def difference(self, run: str, whole: Path | None = None) -> str | None:
        """In what a finished run differs from the uninterrupted one; None where they are equal bit for bit."""
        one, other = self.folder / run, whole or self.whole()
        for name in ("model/model.safetensors", "results.json", "layers.json", "rows.json", "start-scores.json"):
            if (one / name).read_bytes() != (other / name).read_bytes():
                return f"{name} differs"
        if _items(one) != _items(other):
            return "results.items.jsonl.gz differs"
        if timeless(one) != timeless(other):
            return "metrics.jsonl differs"
        # A checkpoint more, of the step at which a run was stopped or that was damaged, is no difference.
        left = {path.name for path in one.iterdir()} ^ {path.name for path in other.iterdir()}
        left = {name for name in left if not name.startswith(("checkpoint-", "passed-over-checkpoint-"))}
        return f"other files: {sorted(left)}" if left else None


def timeless(folder: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without what the clock says."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if "per_second" not in k and "runtime" not in k} for line in lines]


def _items(folder: Path) -> bytes:
    return gzip.decompress((folder / "results.items.jsonl.gz").read_bytes())
