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
from pivotune.runs import lock as run_lock
from pivotune.training.distributed import liveness
from pivotune.training.metrics import MetricsFile
from pivotune.training.trainer import DeepSupervisionTrainer


def inject(faults: dict[str, Any]) -> None:
    """Install the faults of a scenario, by the names of the functions below."""
    run_lock.WAIT_SECONDS = 0.3
    for name, options in faults.items():
        globals()[f"inject_{name}"](**options)


def at_step(step: int, action: Callable[[Any], None]) -> None:
    """Do something once, when optimizer step `step` (from 1) has its batches."""
    begin, done = DeepSupervisionTrainer._begin_step, []

    def begin_step(self: Any) -> None:
        begin(self)
        if self.state.global_step == step - 1 and not done:
            done.append(step)
            action(self)

    DeepSupervisionTrainer._begin_step = begin_step


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
    (from 0); None only counts, in `log`, a line each. Changes without `only` in their line do not count."""
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
    from pivotune.training import trainer as module

    poisoned: list[int] = []
    at_step(step, lambda trainer: poisoned.append(step))
    terms = module.deep_supervision_terms

    def compute(*args: Any, **options: Any) -> Any:
        found = terms(*args, **options)
        if poisoned:
            poisoned.clear()
            found["tft"] = found["tft"]._replace(sum=found["tft"].sum * math.nan)
        return found

    module.deep_supervision_terms = compute


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
    """Rank 1 stands still, or dies, at step 3. Each rank begins to count the seconds when it knows all that its line is
    to say: how long the way to there takes changes nothing.
    """

    trainer: Any

    def __init__(self, end: str, timeout: float) -> None:
        self.end, self.timeout = end, timeout

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            (self.go_on if args.process_index == 0 else self.hold)(self.trainer.liveness)

    def go_on(self, own: Any) -> None:
        """Rank 0: into the step, where it waits for rank 1."""
        silent = liveness.SILENT if self.end == "stops" else 0.0
        while not any(view.state.phase == "held" and view.silent >= silent for view in own.seen()):
            time.sleep(0.05)
        own._timeout = self.timeout
        own.progress("held", 3)

    def hold(self, own: Any) -> None:
        """Rank 1: no further."""
        own.progress("held", 3)
        beat = own._own.beat
        # The second sign of life from here tells of it for certain.
        while own._own.beat < beat + 3:
            time.sleep(0.05)
        if self.end == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        while self.end == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        while not any(view.state.position > own._own.position for view in own.seen()):
            time.sleep(0.05)
        own._timeout = self.timeout
        while True:
            time.sleep(1)


def train_rank(folder: str, end: str, timeout: float) -> int:
    """One of two processes that train a tiny model; rank 1 does at step 3 what `end` says."""
    from tiny_training import make_pairs, tiny_trainer

    # Only a rank that is stopped is silent, however busy the machine is.
    liveness.SILENT = 2.0 if end == "stops" else 1e9
    torch.manual_seed(0)
    hold = _HoldRank(end, timeout)
    trainer = tiny_trainer(Path(folder), rows=make_pairs(32), trainer={"callbacks": [hold]}, ddp_backend="gloo")
    hold.trainer = trainer
    try:
        with liveness.watched(0) as trainer.liveness:
            trainer.train()
    except TrainingError as error:
        print(f"pivotune: stopped: {error}", flush=True)
        return 1
    return 0
