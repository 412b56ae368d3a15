"""How far the cells of a sweep are, read from their run folders alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pivotune.errors import UsageError
from pivotune.evaluation.settings import EvaluationSettings
from pivotune.results.files import results_paths
from pivotune.training.resilience.checkpoints import last_checkpoint


@dataclass(frozen=True, kw_only=True)
class CellState:
    """How far a cell is.

    Attributes:
        started: it has a run folder.
        trained: its model is saved.
        checkpoint: what training goes on from.
        missing: tasks that are not measured yet.
    """

    started: bool
    trained: bool
    checkpoint: Path | None
    missing: tuple[str, ...]

    @property
    def done(self) -> bool:
        return self.trained and not self.missing

    def __str__(self) -> str:
        """What is left to do."""
        if self.done:
            return "done"
        if self.trained:
            return f"trained; to evaluate: {', '.join(self.missing)}"
        if self.checkpoint:
            return f"to go on from {self.checkpoint.name}"
        return "to train again from the start" if self.started else "to train"


def cell_state(folder: Path, tasks: Iterable[str], settings: EvaluationSettings) -> CellState:
    """How far a cell is, from the files in its folder."""
    trained = is_trained(folder)
    return CellState(
        started=is_started(folder),
        trained=trained,
        checkpoint=None if trained else last_checkpoint(folder),
        missing=missing_tasks(folder, tasks, settings),
    )


def missing_tasks(folder: Path, tasks: Iterable[str], settings: EvaluationSettings) -> tuple[str, ...]:
    """Tasks that the folder's results lack, or hold for other settings (another `--limit`)."""
    entries = read_entries(folder)
    return tuple(name for name in tasks if name not in entries or not _is_measured_so(entries[name], settings))


def read_entries(folder: Path) -> dict[str, Any]:
    """The tasks in a folder's `results.json` (or in a results file); none where there is no such file."""
    path, _ = results_paths(folder)
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["tasks"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: cannot be read; remove it to measure again") from error


def is_started(folder: Path) -> bool:
    """Whether a training has begun here."""
    return (folder / "config.yaml").is_file()


def is_trained(folder: Path) -> bool:
    """Whether the training has ended: `model/` is the last that it writes, and appears as a whole."""
    return (folder / "model").is_dir()


def _is_measured_so(entry: Mapping[str, Any], settings: EvaluationSettings) -> bool:
    """Whether a task was measured with these settings; results of training have none."""
    own = entry.get("settings") or {}
    if settings.split not in (own.get("split"), entry.get("split")):
        # As it was asked for (`val`), or by the name that the set gives it.
        return False
    return all(
        own.get(key) == getattr(settings, key) for key in ("limit", "seed", "max_new_tokens", "backend", "dtype")
    )
