"""Run folders: who may write into one, the lock of the running process, and the files that describe the run."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pivotune.config.settings import RunConfig
from pivotune.config.training_fields import IN_CHECKPOINTS
from pivotune.config.yaml_text import dump_config, parse_config, read_yaml
from pivotune.errors import UsageError
from pivotune.models.locating import CHECKSUMS
from pivotune.results.files import flatten
from pivotune.text.files import write_json, write_text
from pivotune.text.redaction import redact_command, redact_settings
from pivotune.training.resilience.checkpoints import PASSED_OVER, STAGING, is_checkpoint_name, remove_folder

logger = logging.getLogger(__name__)
LOCK = ".lock"
# The data workers of a killed process keep its files open until they notice, after up to 5 seconds.
WAIT_SECONDS = 6.0
TRAINING_PICTURE = "training.png"
_OWN_FILES = ("layers.json", "layers.png", "metrics.jsonl", "results.json", "results.items.jsonl.gz", "README.md",
              TRAINING_PICTURE, "english-features.safetensors", "english-predictions.safetensors", "lens.safetensors",
              "rows.json", "start-scores.json", "layers-before.json", "layers-after.json", "data-check.json")  # fmt: skip
_MARKS = ("config.yaml", "environment.json")  # a folder with these is a run
_OWN_FOLDERS = ("model", "adapter", STAGING)
# Name of a file that `write_bytes` has not renamed yet; editors keep files of other names beside the edited one.
_HALF_WRITTEN = re.compile(r"\.(.+)\.[a-z0-9_]{8}")
_LIBRARIES = (
    "pivotune", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "tokenizers", "numpy",
)  # fmt: skip

# ---- who may write ----


def claim_run_folder(config: RunConfig, *, overwrite: bool = False, resume: bool = False) -> Path:
    """Check that this run may write into its folder. Nothing is written, but `overwrite` removes an old run.

    The folder of a run that failed before its first step is free for another one.

    Raises:
        UsageError: the folder holds another run or foreign files, or the run to resume has another configuration.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output_dir: {folder} is a file")
    if not folder.exists() or not any(not _is_leftover(path) for path in folder.iterdir()):
        if resume:
            raise UsageError(f"output_dir: there is no run in {folder} to resume")
        return folder
    check_unlocked(folder)
    if not holds_run(folder):
        raise UsageError(f"output_dir: {folder} is not empty and holds no run; choose another folder")
    if resume:
        _refuse_links_out(folder)
        check_same_run(folder, config)
    elif overwrite:
        _remove_run(folder)
    elif has_trained(folder):
        raise UsageError(f"output_dir: {folder} already holds a run; add --resume to go on with it or --overwrite")
    return folder


def _is_leftover(path: Path) -> bool:
    """Return True for a file of a process that was killed before it wrote `config.yaml`, or after it removed it."""
    if path.name == "environment.json":
        return _is_of_pivotune(path)
    half_written = _HALF_WRITTEN.fullmatch(path.name)
    return path.name in (LOCK, STAGING) or (half_written is not None and half_written[1] in _MARKS)


def has_trained(folder: Path) -> bool:
    """Return True unless a run failed here before its first step was logged and before anything was saved."""
    if not _is_of_pivotune(folder / "environment.json"):
        # A `config.yaml` of the user's own.
        return True
    saved = [*_checkpoint_names(folder), *_passed_over_names(folder), "model", "adapter", "results.json"]
    # A kill may have left the only checkpoint between its two renames.
    if any((folder / name).exists() for name in saved) or any((folder / STAGING).glob("*.old")):
        return True
    metrics = folder / "metrics.jsonl"
    return metrics.is_file() and '"loss":' in metrics.read_text(encoding="utf-8", errors="replace")


def holds_run(folder: Path) -> bool:
    """Return True if a run was begun here.

    Other programs write a `config.yaml` too, beside a `model/` or a `README.md` that must not be replaced.
    """
    if not (folder / "config.yaml").is_file():
        return False
    try:
        read_run_config(folder)
    except UsageError:
        return _is_of_pivotune(folder / "environment.json")
    return True


def _is_of_pivotune(path: Path) -> bool:
    """Return True for an `environment.json` of any version; a newer `config.yaml` may have unknown keys."""
    try:
        return "pivotune" in json.loads(path.read_text(encoding="utf-8"))["libraries"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_finished(folder: Path) -> bool:
    """Return True if the run has ended: `model/` is written last, as a whole.

    A run that is trained further has a newer `config.yaml` or checkpoint.
    """
    last = folder / "model" / CHECKSUMS
    if not last.is_file() or not (folder / "results.json").is_file():
        return False
    begun = [folder / "config.yaml", *(path / CHECKSUMS for path in folder.glob("checkpoint-*"))]
    return last.stat().st_mtime_ns >= max(path.stat().st_mtime_ns for path in begun if path.is_file())


def check_same_run(folder: Path, config: RunConfig) -> None:
    """Refuse settings that differ from the run's, except `training:` and `faults:`: a longer run is the same run.

    Settings of `training:` that lie in a checkpoint must not differ either: the old value would be used without a message.

    Raises:
        UsageError: names the key and both values.
    """
    change = find_change(folder, config, ignored=("training", "faults", "output_dir"))
    change = change or find_change(folder, config, only=tuple(f"training.{name}" for name in IN_CHECKPOINTS))
    if change is not None:
        key, before, now = change
        raise UsageError(
            f"--resume: {key} is {now!r} here and was {before!r} in {folder}; resume with the same settings or choose "
            "another output_dir"
        )


def find_change(
    folder: Path, config: RunConfig, *, ignored: tuple[str, ...] = (), only: tuple[str, ...] | None = None
) -> tuple[str, Any, Any] | None:
    """Return the first key in which a run's `config.yaml` differs from `config`, and both values: (key, before, now).

    Args:
        ignored: prefixes of keys to pass over.
        only: keys, or sections, to compare; None compares all.
    """
    # `config.yaml` has no secrets: they are removed from the other side too.
    before, now = (flatten(redact_settings(each.model_dump())) for each in (read_run_config(folder), config))
    compared = None if only is None else tuple(f"{key}." for key in only)
    for key in sorted(before.keys() | now.keys()):
        is_compared = not key.startswith(ignored) if compared is None else f"{key}.".startswith(compared)
        if key == "data.language" and isinstance(before.get(key), list) and not isinstance(now.get(key), list):
            # The run has found these languages in its rows.
            continue
        if is_compared and before.get(key) != now.get(key):
            return key, before.get(key), now.get(key)
    return None


def _refuse_links_out(folder: Path) -> None:
    """Refuse links out of a run that goes on: they would lead its writing anywhere."""
    inside = folder.resolve()
    for path in (folder / name for name in (*_OWN_FILES, *_MARKS, *_OWN_FOLDERS, *_checkpoint_names(folder))):
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise UsageError(
                f"--resume: {path} is a link to {path.resolve()}, outside of the run; replace it with what it points to"
            )


def _remove_run(folder: Path) -> None:
    """Remove the files of a run and no others: checkpoints first, the files that mark a run last."""
    try:
        for name in (*_checkpoint_names(folder), *_passed_over_names(folder), *_OWN_FOLDERS):
            remove_folder(folder / name)
        for name in (*_OWN_FILES, *_MARKS):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"--overwrite: {error.filename or folder} cannot be removed ({error.strerror}); remove it or choose another "
            "output_dir"
        ) from error


def _checkpoint_names(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("checkpoint-*") if is_checkpoint_name(path.name)]


def _passed_over_names(folder: Path) -> list[str]:
    names = [path.name for path in folder.glob(f"{PASSED_OVER}*")]
    return [name for name in names if is_checkpoint_name(name.removeprefix(PASSED_OVER))]


def remove_leftovers(folder: Path, *, resume: bool) -> None:
    """Remove temporary files of a process that was killed inside `write_bytes`; for a new run also the files of one that
    failed before its first step. Arrays stay: they are compared with weights, rows and settings before they are used."""
    for name in () if resume else ("layers.json", "rows.json", "start-scores.json", "metrics.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob(".*"):
        if (match := _HALF_WRITTEN.fullmatch(path.name)) and match[1] in (*_OWN_FILES, *_MARKS):
            path.unlink(missing_ok=True)


# ---- the lock ----


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock inside. The operating system releases it when the process dies, in any way.

    Raises:
        UsageError: another process holds it, or it is a link.
    """
    path = folder / LOCK
    if path.is_symlink():
        # The target of a link is not ours to write to.
        raise UsageError(f"output_dir: {path} is a link to {path.readlink()}; remove it")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=WAIT_SECONDS)
    except Timeout as error:
        try:
            pid, host = path.read_text(encoding="utf-8").split()
            owner = f" by process {pid} on {host}"
        except (OSError, ValueError):
            owner = ""
        raise UsageError(f"output_dir: {folder} is in use{owner}; wait for it or choose another folder") from error
    except (OSError, NotImplementedError) as error:
        # Some network file systems have no locks.
        logger.warning("%s cannot be locked (%s): see to it that no other process trains there", folder, error)
        yield
        return
    try:
        with suppress(OSError):
            path.write_text(f"{os.getpid()} {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def check_unlocked(folder: Path) -> None:
    """Refuse a folder in which another process trains."""
    if (folder / LOCK).is_file() or (folder / LOCK).is_symlink():
        with run_lock(folder):
            pass


# ---- the files that describe a run ----


def read_run_config(folder: Path) -> RunConfig:
    """Return the configuration that a run was started with."""
    path = folder / "config.yaml"
    return parse_config(read_yaml(path), where=str(path))


def find_run_config(model: str) -> RunConfig | None:
    """Return the configuration of a run folder; None for any other model."""
    folder = Path(model).expanduser()
    return read_run_config(folder) if (folder / "config.yaml").is_file() else None


def write_run_config(folder: Path, config: RunConfig) -> None:
    """Write `config.yaml` (resolved, with all defaults, without secrets) and `environment.json`."""
    make_folder(folder)
    try:
        # First the file that alone does not mark a run.
        write_json(folder / "environment.json", environment())
        write_text(folder / "config.yaml", dump_config(config))
    except OSError as error:
        raise UsageError(f"output_dir: {folder} cannot be written ({error.strerror})") from error


def make_folder(folder: Path) -> None:
    """Make the run's folder if it does not exist."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"output_dir: {folder} cannot be written ({error.strerror})") from error


def environment() -> dict[str, Any]:
    """Return versions, hardware and the command, with which the run can be repeated."""
    import torch

    program = Path(sys.argv[0]).name
    libraries: dict[str, str | None] = dict.fromkeys(_LIBRARIES)
    for name in _LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            libraries[name] = importlib.metadata.version(name)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "libraries": libraries,
        "command": ["pivotune" if program == "__main__.py" else program, *redact_command(sys.argv[1:])],
    }
