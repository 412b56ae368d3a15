"""Run configurations on a tiny model for tests of the command line, and finished runs that such tests share."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import yaml
from conftest import build_tiny_model, build_tiny_tokenizer, tiny_rows
from filelock import FileLock

from pivotune.cli.main import main
from pivotune.config.settings import merged

# Most runs here have both losses, and read raw states: a tuned lens takes a fit and hundreds of tokens.
RAW = {"conversion": {}, "lens": "logit", "layers": "paper", "logits": {"gradient": "all"}}
STEPS = 2
LAYERS = ["supervision.conversion.layer=1", "supervision.thinking.layer=3"]


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_config(folder: Path, model: Path, rows: Path | str, **changes) -> Path:
    settings = {
        "model": str(model),
        "data": {"train": str(rows), "validation": 3, "language": "sw"},
        "training": {
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "bf16": False,
        },
        "output_dir": str(folder / "run"),
        **changes,
        "supervision": merged(RAW, changes.get("supervision") or {}),
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    return path


def set_options(changes) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(run: Path) -> list[dict]:
    return [line for line in metrics(run) if "tft_loss" in line]


@dataclass(frozen=True)
class FinishedRun:
    """A run that tests may read but not change: its folder, its configuration file, and the text on stdout."""

    folder: Path
    config: Path
    printed: str


class FinishedRuns:
    """Runs on 16 rows by name, each trained once by the first test process that needs it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    @property
    def model(self) -> Path:
        """The folder of the tiny model that the runs start from."""
        folder = self._folder / "start"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                build_tiny_model().save_pretrained(folder)
                build_tiny_tokenizer().save_pretrained(folder)
        return folder

    def __call__(self, name: str, *changes: str) -> FinishedRun:
        folder = self._folder / name
        printed = folder / "printed.txt"
        with FileLock(f"{folder}.lock"):
            if not printed.exists():
                folder.mkdir()
                write_config(folder, self.model, write_jsonl(folder / "pairs.jsonl", tiny_rows(16)))
                with redirect_stdout(io.StringIO()) as stdout:
                    assert main(["train", str(folder / "run.yaml"), *set_options(changes)]) == 0
                printed.write_text(stdout.getvalue(), encoding="utf-8")
        return FinishedRun(folder / "run", folder / "run.yaml", printed.read_text(encoding="utf-8"))
