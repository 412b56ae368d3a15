"""Train and evaluate every cell of a sweep; the run folders hold the progress, so the same command continues it."""

from __future__ import annotations

import gc
import json
import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from pivotune.compare.layer_curve import Swept
from pivotune.config.registry import METHODS
from pivotune.config.settings import RunConfig
from pivotune.errors import UsageError
from pivotune.evaluation.cache import CACHE_FOLDER
from pivotune.evaluation.prepare import EvaluationSettings
from pivotune.evaluation.run import execute_evaluation, prepare_evaluation
from pivotune.layers.layers_json import read_layers_json
from pivotune.models.loading import read_config
from pivotune.report.figures.layers import reported_figures
from pivotune.results.files import flatten, read_entries
from pivotune.runs.execute import Progress, Scores, execute_run
from pivotune.runs.folder import claim_run_folder, find_change, has_trained, read_run_config
from pivotune.runs.prepare import prepare_run
from pivotune.runs.record import changed_data_file
from pivotune.sweeps.plan import Cell
from pivotune.text.files import write_json, write_text
from pivotune.text.redaction import redact
from pivotune.training.arguments import build_arguments
from pivotune.training.layer_choice import check_layers
from pivotune.training.lens_fitting import LENS_FILE
from pivotune.training.resilience.checkpoints import last_checkpoint
from pivotune.training.resilience.preemption import StopSignals

PLAN = "sweep.json"
BASE = "base"
DONE = "done"
_MEASURED_WITH = ("limit", "seed", "max_new_tokens", "backend", "dtype")

# Shows the progress of one training: `with watch("Training") as callback: ...`.
Watch = Callable[[str], AbstractContextManager[TrainerCallback | None]]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A fully checked plan, made from the run configuration `source`.

    Attributes:
        tasks: names of the tasks, groups expanded; none measures the held-out rows only.
        bases: starting models by the name of their folder; several in a grid over models or templates.
    """

    source: Path
    folder: Path
    cells: tuple[Cell, ...]
    tasks: tuple[str, ...]
    bases: Mapping[str, RunConfig]
    settings: EvaluationSettings

    def state(self, cell: Cell) -> str:
        """Return the remaining work of a cell, read from its folder; `done` if there is none."""
        missing = self.missing(cell.folder)
        if is_trained(cell.folder):
            return f"trained; to evaluate: {', '.join(missing)}" if missing else DONE
        if checkpoint := last_checkpoint(cell.folder):
            return f"to go on from {checkpoint.name}"
        return "to train again from the start" if is_started(cell.folder) else "to train"

    def missing(self, folder: Path) -> tuple[str, ...]:
        """Return the tasks that a folder's results lack, or hold for other settings (another `--limit`)."""
        entries, wanted = read_entries(folder), self.settings

        def is_measured(entry: Mapping[str, Any]) -> bool:
            own = entry.get("settings") or {}  # results of training have none
            # The split as it was asked for (`test`), or by the benchmark's own name for it (`devtest`).
            same_split = wanted.split in (own.get("split"), entry.get("split"))
            return same_split and all(own.get(key) == getattr(wanted, key) for key in _MEASURED_WITH)

        return tuple(name for name in self.tasks if name not in entries or not is_measured(entries[name]))


def swept_runs(sweep: Sweep) -> list[Swept]:
    """Return every cell with the layers and results that its folder holds so far."""
    runs = []
    for cell in sweep.cells:
        path = cell.folder / "layers.json"
        layers: Any = read_layers_json(path) if path.is_file() else {}
        runs.append(Swept(flatten(cell.config.model_dump(mode="json")), layers, read_entries(cell.folder)))
    return runs


def is_started(folder: Path) -> bool:
    """Return True if a cell has trained: another configuration may follow one that failed before its first step."""
    return (folder / "config.yaml").is_file() and has_trained(folder)


def is_trained(folder: Path) -> bool:
    # The training writes `model/` last, and renames it into place.
    return (folder / "model").is_dir()


def prepare_sweep(
    source: Path,
    folder: Path,
    cells: Sequence[Cell],
    tasks: Sequence[str],
    settings: EvaluationSettings,
    languages: Sequence[str] = (),
) -> Sweep:
    """Check the folder, all configurations, the data and all tasks, without loading weights or writing anything.

    `tasks` and `languages` are as in `find_tasks`; no languages for the run's own.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out: {folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PLAN).is_file():
        raise UsageError(f"--out: {folder} is not empty and not a sweep; choose another folder")
    for cell in cells:
        _check_cell(cell)
    # Data are read once for all untrained cells with the same model, method and data.
    untrained = [cell for cell in cells if not is_trained(cell.folder)]
    data_keys = {"model", "revision", "method", "data"}
    found: dict[str, RunConfig] = {}
    for cell in _distinct(untrained, lambda config: (config.model_dump_json(include=data_keys), config.lora is None)):
        # A damaged checkpoint makes its own cell fail later, not the whole sweep.
        prepared_run = prepare_run(cell.config, resume=is_started(cell.folder), choose_checkpoint=False)
        found[cell.name] = prepared_run.config
    starts = _distinct(cells, lambda config: (config.model, config.revision, config.data.template))
    bases = {BASE if n == 1 else f"{BASE}-{n}": cell.config for n, cell in enumerate(starts, start=1) if tasks}
    names: tuple[str, ...] = ()
    for config, cell in zip(bases.values(), starts, strict=False):
        # Only a run that has read its rows knows all of their languages.
        own = languages or (found.get(cell.name) or read_run_config(cell.folder)).data.languages
        prepared = prepare_evaluation(config.model, tasks, _of_base(settings, config), own)
        names = tuple(task.task.name for task in prepared.tasks)
    return Sweep(source=source, folder=folder, cells=tuple(cells), tasks=names, bases=bases, settings=settings)


def _check_cell(cell: Cell) -> None:
    """Check a cell without its rows: configuration and data files are unchanged, its arguments and layers are possible."""
    folder, config = cell.folder, cell.config
    advice = "choose another --out, or remove that folder to train it again"
    if is_started(folder) and (change := find_change(folder, config, ignored=("output_dir",))) is not None:
        key, before, now = change
        raise UsageError(f"{key} is {now!r} here and was {before!r} in {folder}; {advice}")
    if is_trained(folder):
        if (changed := changed_data_file(folder, config.data)) is not None:
            raise UsageError(f"data.{changed[0]}: {changed[1]} is not what {folder} was trained with; {advice}")
        return
    claim_run_folder(config, resume=is_started(folder))
    args = build_arguments(config)
    if METHODS[config.method].inner_losses:
        model_config = read_config(config.model, trust_remote_code=config.trust_remote_code, revision=config.revision)
        check_layers(args.supervision, model_config.get_text_config().num_hidden_layers)


def _distinct(cells: Sequence[Cell], key: Callable[[RunConfig], object]) -> list[Cell]:
    """Return the first cell of each key."""
    first: dict[object, Cell] = {}
    for cell in cells:
        first.setdefault(key(cell.config), cell)
    return list(first.values())


def _of_base(settings: EvaluationSettings, config: RunConfig) -> EvaluationSettings:
    """Return settings in which a starting model gets the template of the models trained from it."""
    template, revision, trusted = config.data.template, config.revision, config.trust_remote_code
    return replace(settings, template=template, revision=revision, trust_remote_code=trusted)


def run_sweep(
    sweep: Sweep,
    *,
    announce: Callable[[str], None],
    watch: Watch = lambda title: nullcontext(),
    progress: Progress | None = None,
    stop_signals: StopSignals | None = None,
) -> dict[str, str]:
    """Do all remaining work: the starting model first, then cell by cell; `announce` receives a line before each part.

    Returns:
        The reasons of failures in one line each, by cell (or `base`); empty where all is done.

    Raises:
        StoppedBySignalError: a signal asked to stop; the current cell has saved a checkpoint.
    """
    stop_signals = stop_signals or StopSignals()
    work = _Work(sweep, announce, watch, progress, stop_signals)
    jobs = {name: partial(work.do_base, name) for name in sweep.bases}
    jobs |= {cell.name: partial(work.do_cell, number, cell) for number, cell in enumerate(sweep.cells, start=1)}
    failures: dict[str, str] = {}
    sweep.folder.mkdir(parents=True, exist_ok=True)
    write_json(sweep.folder / PLAN, describe_sweep(sweep, failures))
    for name, job in jobs.items():
        log = sweep.folder / f"{name}.error.txt"
        log.unlink(missing_ok=True)
        try:
            job()
        except Exception as error:  # a failure of any kind must not cost the other cells
            # A signal reaches data workers too: the failure may be its consequence.
            stop_signals.check()
            write_text(log, redact(traceback.format_exc()))
            text = redact(" ".join(str(error).split())) or "no message"
            failures[name] = text if isinstance(error, UsageError) else f"{type(error).__name__}: {text}"
            announce(f"{name} failed: {failures[name]} (traceback in {log})")
        write_json(sweep.folder / PLAN, describe_sweep(sweep, failures))
        _free_memory()
    return failures


def describe_sweep(sweep: Sweep, failures: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of `sweep.json`: the parts of the sweep and the progress of each cell."""
    return {
        "config": str(sweep.source),
        "tasks": list(sweep.tasks),
        "evaluation": json.loads(json.dumps(asdict(sweep.settings), default=str)),
        "base": {name: {"model": config.model, "error": failures.get(name)} for name, config in sweep.bases.items()},
        "cells": [
            {
                "name": cell.name,
                "changes": [redact(change) for option in cell.options for change in option.changes],
                "seed": cell.seed,
                "state": "failed" if cell.name in failures else sweep.state(cell),
                "error": failures.get(cell.name),
            }
            for cell in sweep.cells
        ],
    }


@dataclass
class _Work:
    """Train and evaluate; score the starting model, and fit its lens, once for equal rows."""

    sweep: Sweep
    announce: Callable[[str], None]
    watch: Watch
    progress: Progress | None
    stop_signals: StopSignals
    before: dict[str, Scores] = field(default_factory=dict)
    lenses: dict[str, Path] = field(default_factory=dict)

    def do_base(self, name: str) -> None:
        folder, config = self.sweep.folder / name, self.sweep.bases[name]
        missing = self.sweep.missing(folder)
        self.announce(f"{name}: " + (f"to evaluate: {', '.join(missing)}" if missing else "done"))
        self._evaluate(config.model, folder, missing, _of_base(self.sweep.settings, config))

    def do_cell(self, number: int, cell: Cell) -> None:
        title, missing = f"[{number}/{len(self.sweep.cells)}] {cell.name}", self.sweep.missing(cell.folder)
        self.announce(f"{title}: {self.sweep.state(cell)}")
        if not is_trained(cell.folder):
            self._train(cell)
            _free_memory()
            if missing:
                self.announce(f"{title}: to evaluate: {', '.join(missing)}")
        settings = replace(self.sweep.settings, trust_remote_code=cell.config.trust_remote_code)
        self._evaluate(cell.folder, cell.folder, missing, settings)

    def _train(self, cell: Cell) -> None:
        config, resume = cell.config, is_started(cell.folder)
        prepared = prepare_run(config, resume=resume)
        # Every setting that the starting model's held-out scores depend on.
        same = config.model_dump(include={"model", "revision", "data", "seed", "dtype", "quantize", "lora"})
        method = METHODS[config.method]
        key = json.dumps([same, method.main_language, method.pivot_marker, config.training.get("bf16")])
        shared: dict[str, Any] = {
            "progress": self.progress,
            "stop_signals": self.stop_signals,
            "draw": reported_figures,
        }
        lens, known = cell.folder / LENS_FILE, self.lenses.get(key)
        if known is not None and not lens.exists():
            # The run looks whether it is the lens of its own layers and settings.
            cell.folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(known, lens)
        with self.watch("Training") as callback:
            callbacks = [] if callback is None else [callback]
            before = self.before.get(key)
            run = execute_run(prepared, resume=resume, callbacks=callbacks, before=before, **shared)
            self.before[key] = run.before
        if lens.exists():
            self.lenses[key] = lens

    def _evaluate(self, model: str | Path, folder: Path, tasks: Sequence[str], settings: EvaluationSettings) -> None:
        if tasks:
            prepared = prepare_evaluation(model, tasks, replace(settings, cache=folder / CACHE_FOLDER))
            execute_evaluation(prepared, folder, progress=self.progress)


def _free_memory() -> None:
    gc.collect()  # trainer and model refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
