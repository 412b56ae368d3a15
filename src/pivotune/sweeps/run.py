"""Run a sweep: train and evaluate every cell of a plan, keep what is finished, go on after a failure.

What is done is read from the cells' own run folders, so a sweep that was stopped anywhere goes on with the same command.
"""

from __future__ import annotations

import gc
import json
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from pivotune.config.registry import METHODS
from pivotune.config.settings import RunConfig
from pivotune.errors import UsageError
from pivotune.evaluation.cache import CACHE_FOLDER
from pivotune.evaluation.run import execute_evaluation, prepare_evaluation
from pivotune.evaluation.settings import EvaluationSettings
from pivotune.models.loading import read_config
from pivotune.runs.execute import Progress, Scores, execute_run
from pivotune.runs.folder import claim_run_folder, find_change
from pivotune.runs.prepare import prepare_run
from pivotune.sweeps.plan import Cell
from pivotune.sweeps.state import CellState, cell_state, is_started, is_trained, missing_tasks
from pivotune.text.files import write_json, write_text
from pivotune.text.redaction import redact
from pivotune.training.arguments import build_arguments
from pivotune.training.preparation import check_layers
from pivotune.training.resilience.preemption import StopSignals

PLAN = "sweep.json"
BASE = "base"

# Shows the progress of one training: `with watch("Training") as callback: ...`.
Watch = Callable[[str], AbstractContextManager[TrainerCallback | None]]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A plan whose every part was checked.

    Attributes:
        source: the run configuration that the cells are made from.
        tasks: names of the tasks, groups written out; none measures the held-out rows only.
        bases: starting models by the name of their folder; more than one where the grid is over models or templates.
    """

    source: Path
    folder: Path
    cells: tuple[Cell, ...]
    tasks: tuple[str, ...]
    bases: Mapping[str, RunConfig]
    settings: EvaluationSettings

    def state(self, cell: Cell) -> CellState:
        """How far one of the cells is."""
        return cell_state(cell.folder, self.tasks, self.settings)


def prepare_sweep(
    source: Path,
    folder: Path,
    cells: Sequence[Cell],
    tasks: Sequence[str],
    settings: EvaluationSettings,
    languages: Sequence[str] = (),
) -> Sweep:
    """Check the folder, all configurations, the data and all tasks; loads no weights, writes nothing.

    Args:
        tasks: names as `pivotune evaluate` takes them.
        languages: for sets and groups without a language; the run's own where this is empty.

    Raises:
        UsageError: the first thing that is wrong, in one line.
    """
    _check_folder(folder)
    for cell in cells:
        _check_cell(cell)
    for cell in _typical(cells):
        # Damaged checkpoints are the trouble of their cell alone, when its turn comes.
        prepare_run(cell.config, resume=is_started(cell.folder), choose_checkpoint=False)
    bases = _bases(cells) if tasks else {}
    names: tuple[str, ...] = ()
    for config in bases.values():
        own = languages or ([config.data.language] if config.data.language else [])
        prepared = prepare_evaluation(config.model, tasks, _of_base(settings, config), own)
        names = tuple(task.task.name for task in prepared.tasks)
    return Sweep(source=source, folder=folder, cells=tuple(cells), tasks=names, bases=bases, settings=settings)


def run_sweep(
    sweep: Sweep,
    *,
    announce: Callable[[str], None],
    watch: Watch | None = None,
    progress: Progress | None = None,
    stop_signals: StopSignals | None = None,
) -> dict[str, str]:
    """Do everything that is not done yet: the starting model first, then cell by cell.

    Args:
        announce: is given a line before each part.
        watch: shows the progress of a training; None shows nothing.
        stop_signals: where signals are received that ask to stop.

    Returns:
        What failed, by cell (or `base`), with the reason in one line; empty where all is done.

    Raises:
        StoppedBySignalError: a signal asked to stop; the cell in hand has saved a checkpoint.
    """
    stop_signals = stop_signals or StopSignals()
    trainings = _Trainings(watch or _unwatched, progress, stop_signals)
    jobs: dict[str, Callable[[], None]] = {
        name: partial(_evaluate_base, sweep, name, config, announce, progress) for name, config in sweep.bases.items()
    }
    for number, cell in enumerate(sweep.cells, start=1):
        title = f"[{number}/{len(sweep.cells)}] {cell.name}"
        jobs[cell.name] = partial(_run_cell, sweep, cell, title, trainings, announce, progress)
    failures: dict[str, str] = {}
    _write_plan(sweep, failures)
    for name, job in jobs.items():
        log = sweep.folder / f"{name}.error.txt"
        if reason := _attempt(job, log, stop_signals):
            failures[name] = reason
            announce(f"{name} failed: {reason} (traceback in {log})")
        _write_plan(sweep, failures)
        _free_memory()
    return failures


def describe_sweep(sweep: Sweep, failures: Mapping[str, str]) -> dict[str, Any]:
    """Content of `sweep.json`: what belongs to the sweep and how far each cell is."""
    cells = [
        {
            "name": cell.name,
            "changes": [redact(change) for option in cell.options for change in option.changes],
            "seed": cell.seed,
            "state": "failed" if cell.name in failures else str(sweep.state(cell)),
            "error": failures.get(cell.name),
        }
        for cell in sweep.cells
    ]
    return {
        "config": str(sweep.source),
        "tasks": list(sweep.tasks),
        "evaluation": json.loads(json.dumps(asdict(sweep.settings), default=str)),
        "base": {name: {"model": config.model, "error": failures.get(name)} for name, config in sweep.bases.items()},
        "cells": cells,
    }


def _write_plan(sweep: Sweep, failures: Mapping[str, str]) -> None:
    sweep.folder.mkdir(parents=True, exist_ok=True)
    write_json(sweep.folder / PLAN, describe_sweep(sweep, failures))


class _Trainings:
    """Trains cells one after the other; the starting model's held-out scores are measured once for equal rows."""

    def __init__(self, watch: Watch, progress: Progress | None, stop_signals: StopSignals) -> None:
        self._watch = watch
        self._progress = progress
        self._stop_signals = stop_signals
        self._before: dict[str, Scores] = {}

    def train(self, cell: Cell) -> None:
        resume = is_started(cell.folder)
        prepared = prepare_run(cell.config, resume=resume)
        key = _held_out_key(cell.config)
        with self._watch("Training") as callback:
            result = execute_run(
                prepared,
                resume=resume,
                callbacks=[] if callback is None else [callback],
                progress=self._progress,
                before=self._before.get(key),
                stop_signals=self._stop_signals,
            )
        self._before[key] = result.before


def _run_cell(
    sweep: Sweep,
    cell: Cell,
    title: str,
    trainings: _Trainings,
    announce: Callable[[str], None],
    progress: Progress | None,
) -> None:
    state = sweep.state(cell)
    announce(f"{title}: {state}")
    if not state.trained:
        trainings.train(cell)
        _free_memory()
        if state.missing:
            announce(f"{title}: to evaluate: {', '.join(state.missing)}")
    if state.missing:
        settings = replace(
            sweep.settings, cache=cell.folder / CACHE_FOLDER, trust_remote_code=cell.config.trust_remote_code
        )
        execute_evaluation(prepare_evaluation(cell.folder, state.missing, settings), cell.folder, progress=progress)


def _evaluate_base(
    sweep: Sweep, name: str, config: RunConfig, announce: Callable[[str], None], progress: Progress | None
) -> None:
    folder = sweep.folder / name
    missing = missing_tasks(folder, sweep.tasks, sweep.settings)
    announce(f"{name}: " + (f"to evaluate: {', '.join(missing)}" if missing else "done"))
    if missing:
        settings = replace(_of_base(sweep.settings, config), cache=folder / CACHE_FOLDER)
        execute_evaluation(prepare_evaluation(config.model, missing, settings), folder, progress=progress)


def _attempt(job: Callable[[], None], log: Path, stop_signals: StopSignals) -> str | None:
    """Why it failed, with the traceback in `log`; None where it did not."""
    log.unlink(missing_ok=True)
    try:
        job()
    except Exception as error:  # one cell's failure, whatever it is, must not cost the others
        # A signal reaches data workers too: what fails after it failed of it.
        stop_signals.check()
        write_text(log, redact(traceback.format_exc()))
        text = redact(" ".join(str(error).split())) or "no message"
        return text if isinstance(error, UsageError) else f"{type(error).__name__}: {text}"
    return None


def _unwatched(title: str) -> AbstractContextManager[None]:
    return nullcontext()


def _free_memory() -> None:
    gc.collect()  # trainer and model refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out: {folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PLAN).is_file():
        raise UsageError(f"--out: {folder} is not empty and holds no sweep; choose another folder")


def _check_cell(cell: Cell) -> None:
    """What can be told of a cell without its data: it is what it was, its arguments and its layers are possible."""
    folder, config = cell.folder, cell.config
    if is_started(folder):
        change = find_change(folder, config, ignored=("output_dir",))
        if change is not None:
            key, before, now = change
            raise UsageError(
                f"{key} is {now!r} here and was {before!r} in {folder}; choose another --out, or remove that folder to "
                "train it again"
            )
    if is_trained(folder):
        return
    claim_run_folder(config, resume=is_started(folder))
    args = build_arguments(config)
    if METHODS[config.method].inner_losses:
        model_config = read_config(config.model, trust_remote_code=config.trust_remote_code, revision=config.revision)
        check_layers(args.supervision, model_config.get_text_config().num_hidden_layers)


def _typical(cells: Iterable[Cell]) -> list[Cell]:
    """Untrained cells that differ in what they read: a model, a method, data."""
    typical: dict[str, Cell] = {}
    for cell in cells:
        config = cell.config
        if not is_trained(cell.folder):
            key = json.dumps(
                [config.model, config.revision, config.method, config.data.model_dump(), bool(config.lora)]
            )
            typical.setdefault(key, cell)
    return list(typical.values())


def _bases(cells: Iterable[Cell]) -> dict[str, RunConfig]:
    """Each starting model, as it is evaluated, once."""
    bases: dict[tuple[Any, ...], RunConfig] = {}
    for cell in cells:
        config = cell.config
        bases.setdefault((config.model, config.revision, config.data.template), config)
    names = [BASE, *(f"{BASE}-{number}" for number in range(2, len(bases) + 1))]
    return dict(zip(names, bases.values(), strict=True))


def _of_base(settings: EvaluationSettings, config: RunConfig) -> EvaluationSettings:
    """A starting model is asked in the same template as what was trained from it."""
    return replace(
        settings,
        template=config.data.template,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )


def _held_out_key(config: RunConfig) -> str:
    """Everything that the starting model's held-out scores depend on."""
    return json.dumps(
        [
            config.model_dump(include={"model", "revision", "data", "seed", "dtype", "quantize", "lora"}),
            METHODS[config.method].main_language,
            config.training.get("bf16"),
        ]
    )
