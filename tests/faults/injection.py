"""Faults put into a process before it trains, and points where it waits to be struck from outside."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from pivotune.errors import TrainingError
from pivotune.runs import execute as run_module
from pivotune.runs import folder as run_folder
from pivotune.runs.execute import explained_faults
from pivotune.training.metrics import MetricsFile
from pivotune.training.trainer import DeepSupervisionTrainer


def inject(faults: dict[str, Any]) -> None:
    """Install the faults of a scenario, by the names of the functions below."""
    run_folder.WAIT_SECONDS = 0.3
    for name, options in faults.items():
        globals()[f"inject_{name}"](**options)


def at_step(step: int, action: Callable[[Any], None]) -> None:
    """Do something once, when optimizer step `step` (from 1) has its batches."""
    get, done = DeepSupervisionTrainer.get_batch_samples, []

    def get_batches(self: Any, *args: Any) -> Any:
        found = get(self, *args)
        if self.state.global_step == step - 1 and not done:
            done.append(step)
            action(self)
        return found

    DeepSupervisionTrainer.get_batch_samples = get_batches


def wait_at(marker: str) -> None:
    """Say that the place is reached, and wait until the marker is taken away; a signal may come in the meantime."""
    path = Path(marker)
    path.touch()
    while path.exists():
        time.sleep(0.01)


def inject_hold_step(step: int, marker: str) -> None:
    at_step(step, lambda trainer: wait_at(marker))


def inject_hold_scoring(title: str, marker: str) -> None:
    """In the middle of scoring the starting or the trained model."""
    score = run_module._score

    def held(prepared: Any, model: Any, progress: Any, found: str) -> Any:
        if found == title:
            wait_at(marker)
        return score(prepared, model, progress, found)

    run_module._score = held


def inject_file_limit(step: int, size: int, where: str) -> None:
    """No file may become larger than `size` bytes, as on a full disk, while the `checkpoint` or the log line (`metrics`) of
    that step, the `model` or the `results` are written."""

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def limited(method: Callable[..., Any], step_of: Callable[..., int]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if step_of(*args) == step:
                limit(size)
            try:
                return method(*args, **options)
            finally:
                # The messages of the process go to a file, too.
                limit(resource.RLIM_INFINITY)

        return call

    if where == "checkpoint":
        save = DeepSupervisionTrainer._save_checkpoint
        DeepSupervisionTrainer._save_checkpoint = limited(save, lambda self, *_: self.state.global_step)
    elif where == "metrics":
        MetricsFile.on_log = limited(MetricsFile.on_log, lambda self, args, state, *_: state.global_step)
    else:
        name = {"model": "save_model", "results": "_write_results"}[where]
        setattr(run_module, name, limited(getattr(run_module, name), lambda *_: step))


def inject_kill_at_file(folder: str, number: int | None, only: str = "", log: str | None = None) -> None:
    """Kill the process right before it makes, writes, renames or removes a file of the folder for the `number`-th time
    (from 0); None only counts, in `log`, a line each. Changes without `only` in their line do not count, nor do calls that
    change nothing: making a folder that exists, removing a file that does not."""
    count = 0
    changing = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}

    def strike(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                return
        elif event not in changing:
            return
        path = arguments[0]
        if not isinstance(path, (str, os.PathLike)) or not os.path.abspath(path).startswith(folder):
            return
        if event in ("os.mkdir", "os.remove") and os.path.lexists(path) == (event == "os.mkdir"):
            return
        line = f"{event} {path}"
        if event == "os.rename":
            line += f" -> {arguments[1]}"
        if only not in line:
            return
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        if log is not None:
            with open(log, "a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    sys.addaudithook(strike)


def inject_vanish(step: int) -> None:
    at_step(step, lambda trainer: shutil.rmtree(trainer.args.output_dir))


def inject_read_only(step: int) -> None:
    """The kernel lets root write everywhere: its refusal is played at the calls that make folders and open for writing."""

    def refuse(trainer: Any) -> None:
        folder, mkdir = os.path.abspath(trainer.args.output_dir), os.mkdir

        def read_only(path: Any, *args: Any, **options: Any) -> None:
            if os.path.abspath(path).startswith(folder):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            mkdir(path, *args, **options)

        os.mkdir = read_only

    at_step(step, refuse)


def inject_nan_loss(step: int) -> None:
    """The first micro-batch of the step has a TFT loss that is no number."""
    from pivotune.objectives.deep_supervision import DeepSupervisionLoss

    poisoned: list[int] = []
    at_step(step, lambda trainer: poisoned.append(step))
    terms = DeepSupervisionLoss.terms

    def compute(*args: Any, **options: Any) -> Any:
        found = terms(*args, **options)
        if poisoned:
            poisoned.clear()
            found["tft"] = found["tft"]._replace(sum=found["tft"].sum * math.nan)
        return found

    DeepSupervisionLoss.terms = compute


def inject_infinite_gradient(step: int) -> None:
    """Losses are finite, the gradient is not."""
    training_step = DeepSupervisionTrainer.training_step

    def poisoned(self: Any, model: Any, *args: Any, **options: Any) -> Any:
        loss = training_step(self, model, *args, **options)
        if self.state.global_step == step - 1:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = math.inf
        return loss

    DeepSupervisionTrainer.training_step = poisoned


def inject_kill_worker(step: int) -> None:
    def kill(trainer: Any) -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()

    at_step(step, kill)


class _HoldRank(TrainerCallback):
    """Rank 1 hangs, or dies, at step 3, while rank 0 waits for it."""

    def __init__(self, end: str) -> None:
        self.end = end

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and args.process_index == 1:
            if self.end == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(120)


def train_rank(folder: str, end: str, timeout: int) -> int:
    """Train a tiny model as one of two processes; rank 1 hangs or dies at step 3."""
    from tiny_training import make_pairs, tiny_trainer

    torch.manual_seed(0)
    callbacks = {"callbacks": [_HoldRank(end)]}
    trainer = tiny_trainer(
        Path(folder), rows=make_pairs(32), trainer=callbacks, ddp_backend="gloo", ddp_timeout=timeout
    )
    try:
        with explained_faults(Path(folder)):
            trainer.train()
    except TrainingError as error:
        print(f"pivotune: stopped: {error}", flush=True)
        return 1
    return 0
