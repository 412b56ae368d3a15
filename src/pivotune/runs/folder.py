"""What lies in a run folder, who may write there, and the files that describe a run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pivotune.config.settings import RunConfig
from pivotune.config.yaml_text import dump_config, parse_config
from pivotune.errors import UsageError
from pivotune.runs.lock import LOCK, check_unlocked
from pivotune.text.files import write_json, write_text
from pivotune.text.redaction import redact_command, redact_settings
from pivotune.training.resilience.checkpoints import PASSED_OVER, STAGING, is_checkpoint_name, remove_folder
from pivotune.training.resilience.checksums import CHECKSUMS

_OWN_FILES = ("layers.json", "layers.png", "metrics.jsonl", "results.json", "results.items.jsonl.gz", "README.md",
              "training.png", "english-features.safetensors", "rows.json", "start-scores.json")  # fmt: skip
_MARKS = ("config.yaml", "environment.json")  # by which a folder is known for a run
_OWN_FOLDERS = ("model", "adapter", STAGING)
_IN_OPTIMIZER_STATE = tuple(
    f"training.{name}"
    for name in ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args")
)
# What `write_bytes` writes before it renames it; editors keep files of other names beside what they edit.
_HALF_WRITTEN = re.compile(r"\.(.+)\.[a-z0-9_]{8}")
_LIBRARIES = (
    "pivotune",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "tokenizers",
    "numpy",
)


def claim_run_folder(config: RunConfig, *, overwrite: bool = False, resume: bool = False) -> Path:
    """Check that this run may write into its folder; writes nothing yet, except that `overwrite` empties an old run.

    Raises:
        UsageError: the folder holds another run, or files that are none of ours, or a run of another configuration is
            to be resumed.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output_dir: {folder} is a file")
    if not folder.exists() or not any(not _is_leftover(path) for path in folder.iterdir()):
        if resume:
            raise UsageError(f"output_dir: there is no run in {folder} to resume")
        return folder
    check_unlocked(folder)
    if not _holds_run(folder):
        raise UsageError(f"output_dir: {folder} is not empty and holds no run; choose another folder")
    if resume:
        _refuse_links_out(folder)
        check_same_run(folder, config)
    elif overwrite:
        _remove_run(folder)
    else:
        raise UsageError(f"output_dir: {folder} already holds a run; add --resume to go on with it or --overwrite")
    return folder


def holds_run(folder: Path) -> bool:
    """Whether a training has begun here."""
    return folder.is_dir() and _holds_run(folder)


def is_finished(folder: Path) -> bool:
    """Whether the run has ended: `model/` is the last that it writes, and appears as a whole.

    One that is trained further has a newer `config.yaml` or checkpoint.
    """
    last = folder / "model" / CHECKSUMS
    if not last.is_file() or not (folder / "results.json").is_file():
        return False
    begun = [folder / "config.yaml", *(path / CHECKSUMS for path in folder.glob("checkpoint-*"))]
    return last.stat().st_mtime_ns >= max(path.stat().st_mtime_ns for path in begun if path.is_file())


def read_run_config(folder: Path) -> RunConfig:
    """The configuration a run was started with."""
    path = folder / "config.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    return parse_config(settings or {}, where=str(path))


def write_run_config(folder: Path, config: RunConfig) -> None:
    """`config.yaml` (resolved, all defaults written out, no secrets) and `environment.json`."""
    make_folder(folder)
    try:
        write_text(folder / "config.yaml", dump_config(config))
        write_json(folder / "environment.json", environment())
    except OSError as error:
        raise UsageError(f"output_dir: {folder} cannot be written ({error.strerror})") from error


def make_folder(folder: Path) -> None:
    """Make the run's folder where it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"output_dir: {folder} cannot be written ({error.strerror})") from error


def environment() -> dict[str, Any]:
    """Versions and hardware, for whoever wants to repeat the run."""
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "devices": devices,
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "command": [Path(sys.argv[0]).name, *redact_command(sys.argv[1:])],
    }


def remove_half_written(folder: Path) -> None:
    """Remove what a process left that was killed inside `write_bytes`."""
    for path in folder.glob(".*"):
        if (match := _HALF_WRITTEN.fullmatch(path.name)) and match[1] in (*_OWN_FILES, *_MARKS):
            path.unlink(missing_ok=True)


def _is_leftover(path: Path) -> bool:
    """What a process leaves that was killed before it had written `config.yaml`, or after it had removed it."""
    if path.name == "environment.json":
        return _made_by_pivotune(path)
    half_written = _HALF_WRITTEN.fullmatch(path.name)
    return path.name in (LOCK, STAGING) or (half_written is not None and half_written[1] == "config.yaml")


def _holds_run(folder: Path) -> bool:
    """Other programs write a `config.yaml` too, beside a `model/` or a `README.md` that are not ours to replace."""
    if not (folder / "config.yaml").is_file():
        return False
    try:
        read_run_config(folder)
    except UsageError:
        return _made_by_pivotune(folder / "environment.json")
    return True


def _made_by_pivotune(path: Path) -> bool:
    """A run of another version may have keys that this one does not know."""
    try:
        return "pivotune" in json.loads(path.read_text(encoding="utf-8"))["libraries"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def find_change(
    folder: Path, config: RunConfig, *, ignored: tuple[str, ...] = (), only: tuple[str, ...] | None = None
) -> tuple[str, Any, Any] | None:
    """The first key in which a run's `config.yaml` differs from `config`, and both values: (key, before, now).

    Args:
        ignored: what keys may begin with to be passed over.
        only: the keys to look at; None looks at all.
    """
    # `config.yaml` has no secrets: the other side is compared without them too.
    before, now = (_flat(redact_settings(each.model_dump())) for each in (read_run_config(folder), config))
    for key in sorted(before.keys() | now.keys()):
        looked_at = not key.startswith(ignored) if only is None else key in only
        if looked_at and before.get(key) != now.get(key):
            return key, before.get(key), now.get(key)
    return None


def check_same_run(folder: Path, config: RunConfig) -> None:
    """Everything but `training:` and `faults:` must be as it was: a longer run is the same run, other data are not.

    Of `training:` what the optimizer's state in a checkpoint brings along, and would silently be used in place of the new.
    """
    change = find_change(folder, config, ignored=("training", "faults", "output_dir"))
    change = change or find_change(folder, config, only=_IN_OPTIMIZER_STATE)
    if change is not None:
        key, before, now = change
        raise UsageError(
            f"--resume: {key} is {now!r} here and was {before!r} in {folder}; resume with the same settings or choose "
            "another output_dir"
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat.update(_flat(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def _remove_run(folder: Path) -> None:
    """Remove what a run writes and nothing else; first what could be gone on from, last what says that this is a run."""
    passed_over = [
        path.name for path in folder.glob(f"{PASSED_OVER}*") if is_checkpoint_name(path.name.removeprefix(PASSED_OVER))
    ]
    try:
        for name in (*_checkpoint_names(folder), *passed_over, *_OWN_FOLDERS):
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


def _refuse_links_out(folder: Path) -> None:
    """A run is written to as it goes on: a link in it could lead the writing anywhere."""
    inside = folder.resolve()
    for path in (folder / name for name in (*_OWN_FILES, *_MARKS, *_OWN_FOLDERS, *_checkpoint_names(folder))):
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise UsageError(
                f"--resume: {path} is a link to {path.resolve()}, outside of the run; replace it with what it points to"
            )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
