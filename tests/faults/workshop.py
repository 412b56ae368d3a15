"""A folder with a tiny model and rows, and real processes that train in it."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import yaml
from process_pool import Process, Rendezvous, server
from tiny_training import QUIET, run_settings

from pivotune.results.files import read_metrics

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


class Workshop:
    """Runs of one configuration, each in its own output folder.

    Attributes:
        every: of the many repetitions of one fault every nth is tried.
    """

    def __init__(self, folder: Path, *, every: int = 1) -> None:
        self.folder, self.every = folder, every
        self.marker = folder / "marker"
        self.settings = run_settings(server().shared, training=TRAINING)
        # Rows of its own: a scenario changes them.
        shutil.copy(server().shared / "rows.jsonl", self.rows)
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
        return Process(self.folder / f"{self._logs}.log", **request)

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
        whole = server().shared / "whole"
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
