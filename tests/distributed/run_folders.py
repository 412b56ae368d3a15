"""Run folders for tests of resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from tiny_training import run_settings

FINISHED = ("model", "adapter", "results.json", "results.items.jsonl.gz", "README.md")


def as_it_was_at_step_2(finished: Path, folder: Path) -> None:
    """A copy of a finished run without what came after its checkpoint of step 2."""
    shutil.copytree(finished, folder)
    for path in folder.iterdir():
        if path.name in FINISHED or (path.name.startswith("checkpoint-") and path.name != "checkpoint-2"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_run(folder: Path, **training: Any) -> Path:
    """`run.yaml` of four steps of 8 rows, with a checkpoint after each second one, over more than an epoch."""
    settings = run_settings(folder)
    settings["training"] |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps",
                             "eval_steps": 2, **training}  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run, without what depends on the clock or on how rows lie in batches."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = []
    for line in lines:
        names = [name for name in line if "per_second" not in name and "runtime" not in name and "flos" not in name]
        kept.append({name: line[name] for name in names if name != "padding_share"})
    return kept
