"""What can happen to a training, and what is promised: the table of docs/reliability.md, as functions that try it."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.workshop import STEPS, Workshop, timeless
from process_pool import Process

STOPPED, FAILED, MISTAKE = 75, 1, 2


class BrokenPromiseError(AssertionError):
    """What happened is not what was promised."""


@dataclass(frozen=True)
class Scenario:
    """One fault.

    Attributes:
        promise: the outcome, in words.
        attempt: does it in a workshop and raises `BrokenPromiseError` where the promise is not kept.
        quick: part of the ordinary tests.
    """

    name: str
    promise: str
    attempt: Callable[[Workshop], None]
    quick: bool = False


SCENARIOS: dict[str, Scenario] = {}


def scenario(name: str, promise: str, *, quick: bool = False) -> Callable[..., Callable[[Workshop], None]]:
    def register(attempt: Callable[[Workshop], None]) -> Callable[[Workshop], None]:
        SCENARIOS[name] = Scenario(name, promise, attempt, quick)
        return attempt

    return register


def check(kept: Any, what: str) -> None:
    if not kept:
        raise BrokenPromiseError(what)


def check_outcome(process: Process, code: int, *words: str) -> None:
    """The exit code, and one last line with all these words and no traceback before it."""
    check(process.wait() == code, f"exit code {process.code}, {code} was promised: {process.output}")
    check("Traceback" not in process.output, f"a traceback: {process.output}")
    missing = [word for word in words if word not in process.last_line]
    check(not missing, f"{missing} is not in the last line: {process.last_line}")


def check_resumes(shop: Workshop, run: str, *, whole: Path | None = None, **changes: Any) -> None:
    """`--resume` leads to the end that an uninterrupted run has."""
    process = shop.run(run, "--resume", **changes)
    check(process.code == 0, f"resuming ended with {process.code}: {process.output}")
    difference = shop.difference(run, whole)
    check(difference is None, f"the resumed run is not the uninterrupted one: {difference}")


def kill_at_random(shop: Workshop, count: int, seed: int = 0) -> None:
    """One run for each kill, resumed once."""
    process = shop.start("timed")
    # Only now: the first process waits until the server has imported everything.
    started = time.monotonic()
    process.wait()
    duration = time.monotonic() - started
    check_outcome(process, 0)
    draw = random.Random(seed)
    for number in range(count):
        run, moment = f"killed-{number}", draw.uniform(0.0, duration)
        while not killed(shop, run, moment):
            # It was finished before: the machine is not always as slow as it was.
            shutil.rmtree(shop.folder / run)
            moment /= 2
        check_goes_on(shop, run, f"kill {number} after {moment:.2f} s")


def killed(shop: Workshop, run: str, moment: float) -> bool:
    """Whether a run that is killed after so many seconds was still going on."""
    process = shop.start(run, "--auto-resume")
    time.sleep(moment)
    process.kill()
    check(process.code in (0, -signal.SIGKILL), f"ended with {process.code} before the kill: {process.output}")
    return process.code != 0


def check_goes_on(shop: Workshop, run: str, what: str) -> None:
    """`--auto-resume` leads, in one go, to the end that an uninterrupted run has."""
    process = shop.run(run, "--auto-resume")
    check(process.code == 0, f"{what}: resuming ended with {process.code}: {process.output}")
    difference = shop.difference(run)
    check(difference is None, f"{what}: {difference}")


def changes_of_files(shop: Workshop, only: str = "") -> list[str]:
    """What a run does to the files in its folder, a line for each time; only lines that hold some words."""
    log = shop.folder / "changes.txt"
    check_outcome(shop.run("counted", inject=kill_at_file(shop, "counted", None, only, log=str(log))), 0)
    return log.read_text(encoding="utf-8").splitlines()


def kill_at_file(shop: Workshop, run: str, number: int | None, only: str = "", **more: str) -> dict[str, Any]:
    return {"kill_at_file": {"folder": str(shop.folder / run), "number": number, "only": only, **more}}


def check_killed_at_file(shop: Workshop, number: int, only: str, what: str) -> None:
    """A run killed right before a change of a file (see `injection.inject_kill_at_file`) goes on."""
    run = f"killed-{number}"
    process = shop.run(run, inject=kill_at_file(shop, run, number, only))
    check(process.code == -signal.SIGKILL, f"before {what}: ended with {process.code}: {process.output}")
    check_goes_on(shop, run, f"before {what}")
    shutil.rmtree(shop.folder / run)


def stopped_run(
    shop: Workshop,
    run: str,
    step: int = 4,
    number: int = signal.SIGTERM,
    *,
    all_processes: bool = False,
    **changes: Any,
) -> Process:
    """A run that a signal stopped after `step` steps; sent to the processes that it started, too, or to it alone."""
    hold = {"hold_step": {"step": step, "marker": str(shop.marker)}}
    process = shop.start(run, inject=hold, **changes)
    process.wait_for_marker(shop.marker)
    send = process.send_to_all if all_processes else process.send
    send(number)
    # A second one, before the first is acted on.
    send(number)
    shop.marker.unlink()
    process.wait()
    return process


def one_worker(shop: Workshop) -> dict[str, Any]:
    """Training settings with a data worker; eight batches an epoch: what is read ahead at step 3 is not all of them."""
    return {
        **shop.settings["training"],
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": 1,
        "dataloader_prefetch_factor": 1,
    }


def whole_with_worker(shop: Workshop) -> Path:
    """The uninterrupted run of these settings."""
    check(shop.run("whole-worker", training=one_worker(shop)).code == 0, "the uninterrupted run failed")
    return shop.folder / "whole-worker"


# ---- killed and stopped ----


@scenario("kill -9 at any moment", "resumed until finished, 30 runs end bit for bit as the one that nobody killed")
def _kill(shop: Workshop) -> None:
    kill_at_random(shop, 30 // shop.every)


@scenario("kill -9 before each change of a file", "resumed, the run ends so, whichever of its files came next")
def _kill_at_files(shop: Workshop) -> None:
    changes = changes_of_files(shop)
    check(len(changes) > STEPS, f"only {len(changes)} changes of files were seen")
    for number, change in list(enumerate(changes))[:: shop.every]:
        # The checkpoint in the middle has the files of the first and the last one.
        if "/.saving/checkpoint-4/" not in change:
            check_killed_at_file(shop, number, "", change)


@scenario(
    "SIGTERM", "the step is finished and saved, exit code 75, the resumed run ends as if nothing had been", quick=True
)
def _sigterm(shop: Workshop) -> None:
    saved = shop.folder / "run" / "checkpoint-3"
    check_outcome(stopped_run(shop, "run", 3), STOPPED, "stopped by SIGTERM", f"saved {saved}", "--resume")
    check_resumes(shop, "run")


@scenario("SIGUSR1", "as SIGTERM: what Slurm sends ahead of a job's end")
def _sigusr1(shop: Workshop) -> None:
    check_outcome(
        stopped_run(shop, "run", 5, signal.SIGUSR1), STOPPED, "stopped by SIGUSR1", "checkpoint-5", "--resume"
    )
    check_resumes(shop, "run")


@scenario(
    "SIGTERM to the job's processes", "as SIGTERM: data workers, which it reaches too, go on until the step is saved"
)
def _job(shop: Workshop) -> None:
    training = one_worker(shop)
    process = stopped_run(shop, "run", 3, all_processes=True, training=training)
    check_outcome(process, STOPPED, "stopped by SIGTERM", f"saved {shop.folder / 'run' / 'checkpoint-3'}", "--resume")
    check_resumes(shop, "run", whole=whole_with_worker(shop), training=training)


@scenario("SIGTERM in preparation", "exit code 75, --auto-resume starts or goes on", quick=True)
def _preparation(shop: Workshop) -> None:
    hold = {"hold_scoring": {"title": "Scoring the starting model", "marker": str(shop.marker)}}
    process = shop.start("run", inject=hold)
    process.wait_for_marker(shop.marker)
    process.send(signal.SIGTERM)
    check_outcome(process, STOPPED, "stopped by SIGTERM", "no checkpoint yet")
    shop.marker.unlink()
    process = shop.run("run", "--auto-resume")
    check_outcome(process, 0)
    check(shop.difference("run") is None, f"{shop.difference('run')}")
    process = shop.run("run", "--auto-resume")
    check(process.code == 0 and "finished run" in process.output, f"a finished run: {process.output}")


@scenario("SIGTERM in the last scoring", "exit code 75, the last checkpoint is kept, resuming trains no step")
def _last_scoring(shop: Workshop) -> None:
    hold = {"hold_scoring": {"title": "Scoring the trained model", "marker": str(shop.marker)}}
    process = shop.start("run", inject=hold)
    process.wait_for_marker(shop.marker)
    process.send(signal.SIGTERM)
    check_outcome(process, STOPPED, "stopped by SIGTERM", f"checkpoint-{STEPS}")
    check(not (shop.folder / "run" / "model").exists(), "a model was saved")
    check_resumes(shop, "run")


@scenario("SIGTERM in a sweep", "the cell in hand is saved, exit code 75, the same command goes on", quick=True)
def _sweep(shop: Workshop) -> None:
    config = shop.write_config("cells")
    words = ["sweep", str(config), "--seeds", "0,1", "--out", str(shop.folder / "cells")]
    process = shop.fork(arguments=words, faults={"hold_step": {"step": 3, "marker": str(shop.marker)}})
    process.wait_for_marker(shop.marker)
    process.send(signal.SIGTERM)
    shop.marker.unlink()
    check_outcome(process, STOPPED, "stopped by SIGTERM", "the same command goes on")
    check((shop.folder / "cells" / "seed=0" / "checkpoint-3").is_dir(), "the cell in hand was not saved")
    check(not (shop.folder / "cells" / "seed=1").exists(), "the next cell was begun")
    process = shop.fork(arguments=words)
    check(process.wait() == 0, f"the same command ended with {process.code}: {process.output}")
    difference = shop.difference("cells/seed=0")
    check(difference is None, f"the resumed cell is not the uninterrupted run: {difference}")
    check((shop.folder / "cells" / "seed=1" / "model").is_dir(), "the other cell was not trained")


# ---- the disk ----


@scenario("disk full: checkpoint", "one line, exit code 2, the checkpoint before is kept and goes on", quick=True)
def _full_checkpoint(shop: Workshop) -> None:
    _full(shop, "checkpoint", 4, 60_000)


@scenario("disk full: metrics.jsonl", "one line, exit code 2, the checkpoint before is kept and goes on")
def _full_metrics(shop: Workshop) -> None:
    _full(shop, "metrics", 4, 100)


@scenario("disk full: model", "one line, exit code 2, the last checkpoint is kept and goes on")
def _full_model(shop: Workshop) -> None:
    _full(shop, "model", 6, 60_000)


@scenario("disk full: results", "one line, exit code 2, the last checkpoint is kept and goes on")
def _full_results(shop: Workshop) -> None:
    _full(shop, "results", 6, 100)


def _full(shop: Workshop, where: str, step: int, size: int) -> None:
    process = shop.run("run", inject={"file_limit": {"where": where, "step": step, "size": size}})
    good = shop.folder / "run" / f"checkpoint-{6 if step == 6 else step - 2}"
    check_outcome(process, MISTAKE, "File too large", f"the last good checkpoint is {good}", "make room", "--resume")
    check_resumes(shop, "run")


@scenario("output folder vanished", "one line that says so, exit code 1")
def _vanished(shop: Workshop) -> None:
    process = shop.run("run", inject={"vanish": {"step": 4}})
    check_outcome(process, FAILED, f"{shop.folder / 'run'} has vanished", "start again")
    process = shop.run("run", "--auto-resume")
    check_outcome(process, 0)
    check(shop.difference("run") is None, f"{shop.difference('run')}")


@scenario("output folder read-only", "one line, exit code 2, the checkpoint before is kept and goes on")
def _read_only(shop: Workshop) -> None:
    process = shop.run("run", inject={"read_only": {"step": 4}})
    good = shop.folder / "run" / "checkpoint-2"
    check_outcome(process, MISTAKE, "Read-only file system", f"the last good checkpoint is {good}", "--resume")
    check_resumes(shop, "run")


# ---- numbers ----


@scenario("loss not finite", "the run stops before the weights change and names step, rows and term; exit code 1")
def _nan(shop: Workshop) -> None:
    process = shop.run("run", inject={"nan_loss": {"step": 4}})
    check_outcome(process, FAILED, "the loss is not a finite number at step 4 (tft nan; rows ")
    check([path.name for path in (shop.folder / "run").glob("checkpoint-*")] == ["checkpoint-2"], "other checkpoints")
    check_resumes(shop, "run")


@scenario("gradient not finite", "as a loss that is not; all rows of the step are named")
def _gradient(shop: Workshop) -> None:
    process = shop.run("run", inject={"infinite_gradient": {"step": 4}})
    check_outcome(process, FAILED, "the gradient is not a finite number at step 4 (norm inf; rows ")
    check_resumes(shop, "run")


@scenario(
    "loss not finite, skipped",
    "faults.nonfinite: skip drops the step, warns, counts it in metrics.jsonl, and stops beyond faults.skip_limit",
    quick=True,
)
def _skip(shop: Workshop) -> None:
    skip = {"faults": {"nonfinite": "skip", "skip_limit": 1}}
    poison = {"nan_loss": {"step": 3}, "infinite_gradient": {"step": 5}}
    process = shop.run("run", inject=poison, **skip)
    check_outcome(process, FAILED, "the gradient is not a finite number at step 5", "faults.skip_limit")
    check(
        "step 3 (tft nan; rows " in process.output and "step skipped (1 of at most 1)" in process.output, process.output
    )
    # The count is kept in checkpoints: one more step may not be skipped after resuming either.
    process = shop.run("run", "--resume", inject={"nan_loss": {"step": 6}}, **skip)
    check_outcome(process, FAILED, "step 6", "faults.skip_limit")
    process = shop.run("run", "--resume", **skip)
    check_outcome(process, 0)
    counted = [line.get("skipped_steps") for line in timeless(shop.folder / "run") if "loss" in line]
    check(counted == [None, 1, 1], f"skipped_steps in metrics.jsonl: {counted}")
    check(all(line["loss"] for line in timeless(shop.folder / "run") if "loss" in line), "a loss that is no number")


# ---- what is not what it was ----


@scenario("damaged checkpoint", "passed over with a warning that names the file; the one before goes on", quick=True)
def _damaged(shop: Workshop) -> None:
    check_outcome(stopped_run(shop, "run", 5), STOPPED)
    weights = shop.folder / "run" / "checkpoint-5" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    state = shop.folder / "run" / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:-40], encoding="utf-8")
    process = shop.run("run", "--resume")
    check_outcome(process, 0)
    for words in (
        "checkpoint-5 is damaged and passed over: model.safetensors is not what was written",
        "checkpoint-4 is damaged and passed over: trainer_state.json has",
        f"resuming: {shop.folder / 'run' / 'checkpoint-2'}",
        f"it is now {shop.folder / 'run' / 'passed-over-checkpoint-5'}",
        f"it is now {shop.folder / 'run' / 'passed-over-checkpoint-4'}",
    ):
        check(words in process.output, f"{words!r} is not in: {process.output}")
    check(shop.difference("run") is None, f"{shop.difference('run')}")


@scenario("all checkpoints damaged", "one line that names what is wrong and what can be done, exit code 2")
def _all_damaged(shop: Workshop) -> None:
    check_outcome(stopped_run(shop, "run", 3), STOPPED)
    (shop.folder / "run" / "checkpoint-3" / "optimizer.pt").unlink()
    (shop.folder / "run" / "checkpoint-2" / "checksums.json").write_text("{", encoding="utf-8")
    before = sorted(shop.folder.rglob("run/**/*"))
    process = shop.run("run", "--resume")
    check_outcome(
        process, MISTAKE, "no checkpoint is whole", "optimizer.pt is missing", "checksums.json", "remove them"
    )
    check(sorted(shop.folder.rglob("run/**/*")) == before, "files were changed")


@scenario("starting model truncated", "one line that names the file, exit code 2, nothing is written")
def _truncated(shop: Workshop) -> None:
    shutil.copytree(shop.settings["model"], shop.folder / "cut")
    weights = shop.folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    process = shop.run("run", model=str(shop.folder / "cut"))
    check_outcome(process, MISTAKE, str(shop.folder / "cut"))


@scenario("data changed", "--resume refuses other rows than the run began with, exit code 2")
def _changed_data(shop: Workshop) -> None:
    check_outcome(stopped_run(shop, "run", 3), STOPPED)
    rows = shop.rows.read_text(encoding="utf-8").splitlines()
    record = json.loads(rows[5])
    record["completion"] += " Ndiyo."
    shop.rows.write_text("\n".join([*rows[:5], json.dumps(record), *rows[6:]]) + "\n", encoding="utf-8")
    check_outcome(shop.run("run", "--resume"), MISTAKE, "rows.jsonl is not what the run in", "--overwrite")
    shop.rows.write_text("\n".join(rows) + "\n", encoding="utf-8")
    check_resumes(shop, "run")


# ---- other processes ----


@scenario("two runs in one folder", "the second is refused with one line, exit code 2; the first goes on", quick=True)
def _two_runs(shop: Workshop) -> None:
    first = shop.start("run", inject={"hold_step": {"step": 3, "marker": str(shop.marker)}})
    first.wait_for_marker(shop.marker)
    for option in ("--resume", "--overwrite", "--auto-resume"):
        second = shop.run("run", option)
        check_outcome(second, MISTAKE, f"{shop.folder / 'run'} is in use by process {first.pid}")
    shop.marker.unlink()
    check_outcome(first, 0)
    check(shop.difference("run") is None, f"{shop.difference('run')}")


@scenario("data worker killed", "one line, exit code 1, the last checkpoint goes on")
def _worker(shop: Workshop) -> None:
    training = one_worker(shop)
    process = shop.run("run", inject={"kill_worker": {"step": 3}}, training=training)
    good = shop.folder / "run" / "checkpoint-2"
    check_outcome(process, FAILED, "a data worker (process", "was killed", f"the last good checkpoint is {good}")
    check_resumes(shop, "run", whole=whole_with_worker(shop), training=training)


@scenario("rank hangs", "after faults.hang_timeout the ranks that wait for it end with one line, exit code 1")
def _hang(shop: Workshop) -> None:
    first, second = _ranks(shop, "hangs", timeout=10)
    check_outcome(first, FAILED, "lost the connection to another rank", "faults.hang_timeout", "--resume")
    second.kill()


@scenario("rank lost", "the ranks that wait for it end with one line, exit code 1")
def _lost(shop: Workshop) -> None:
    first, second = _ranks(shop, "dies", timeout=120)
    check(second.wait() == -signal.SIGKILL, f"rank 1 ended with {second.code}: {second.output}")
    check_outcome(first, FAILED, "lost the connection to another rank", "--resume")


def _ranks(shop: Workshop, end: str, timeout: int) -> list[Process]:
    """Start two processes; rank 1 hangs or dies at its third step."""
    return shop.fork_ranks(
        2, program="faults.injection:train_rank", arguments=[str(shop.folder / "ranks"), end, timeout]
    )
