"""Checkpoints that are whole or not there: written beside with checksums, renamed when complete, checked before use."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from pivotune.errors import UsageError
from pivotune.training.resilience.checksums import TRAINER_STATE, find_checkpoint_damage, reason_of, write_checksums

logger = logging.getLogger(__name__)
STAGING = ".saving"
PASSED_OVER = "passed-over-"  # before the name of a checkpoint that a resumed run has not gone on from
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHECKPOINT = re.compile(r"checkpoint-[0-9]+")


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A folder to write into that becomes `final` when the block ends, and vanishes when it fails.

    It gets its `checksums.json` last. An existing `final` is replaced only after the new one is complete.

    Raises:
        UsageError: the disk is full or not writable; names what is still usable.
    """
    staging = final.parent / STAGING / final.name
    if staging.parent.is_symlink():
        # What it points to is not ours to empty.
        staging.parent.unlink()
    _discard_staged(final.parent)
    try:
        staging.mkdir(parents=True)
        yield staging
        write_checksums(staging)
        _flush(staging)
        _replace(staging, final)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_write_error(error):
            raise
        raise UsageError(_cannot_save(final, error)) from error
    finally:
        _discard_staged(final.parent)


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if is_checkpoint_name(path.name) and path.is_dir()]
    return sorted(found, key=_step_of, reverse=True)


def is_checkpoint_name(name: str) -> bool:
    """Whether a checkpoint of a run would be called so; `checkpoint-7-backup` is somebody's own."""
    return _CHECKPOINT.fullmatch(name) is not None


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None; what is in it is not looked at."""
    return next(iter(checkpoints(folder)), None)


def kept(folder: Path) -> str:
    """What is left of a run to go on from, in words."""
    last = last_checkpoint(folder)
    return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"


def whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run whose every file is what was written; None where there is no checkpoint.

    A damaged one is passed over with a warning that names it and the file.

    Raises:
        UsageError: there are checkpoints, and all are damaged.
    """
    damaged = []
    for path in checkpoints(folder):
        problem = find_checkpoint_damage(path)
        if problem is None:
            return path
        logger.warning("%s is damaged and passed over: %s", path, problem)
        damaged.append(f"{path.name}: {problem}")
    if damaged:
        raise UsageError(
            f"{folder}: no checkpoint is whole ({'; '.join(damaged)}); remove them and give the same command to start from "
            "the beginning"
        )
    return None


def set_newer_aside(folder: Path, chosen: Path) -> None:
    """Rename what is newer than the checkpoint a run goes on from.

    Limits on the number of checkpoints keep the newest by step: one that was passed over would stay, and what the run saves
    before that step be deleted. A damaged one is kept too: what could not be read now may be readable tomorrow.
    """
    step = json.loads((chosen / TRAINER_STATE).read_text(encoding="utf-8"))["global_step"]
    for path in checkpoints(folder):
        if _step_of(path) <= step or path.samefile(chosen):
            return
        aside = folder / f"{PASSED_OVER}{path.name}"
        remove_folder(aside)
        os.replace(path, aside)
        words = "%s is newer than %s, which the run goes on from; it is now %s: remove it if it is of no use"
        logger.warning(words, path, chosen, aside)


def remove_folder(path: Path) -> None:
    """Remove a folder if it is there; of a link the link, never what it points to."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def restore_replaced(folder: Path) -> None:
    """Undo a replacement that a killed process left half done: the old folder moved away, the new one not in place."""
    for old in (folder / STAGING).glob("*.old"):
        final = folder / old.name.removesuffix(".old")
        if not final.exists():
            os.replace(old, final)


def remove_replaced(folder: Path) -> None:
    """Remove what a process left that was killed after its last folder was in place."""
    shutil.rmtree(folder / STAGING, ignore_errors=True)


def _discard_staged(folder: Path) -> None:
    """Empty the staging folder, but never of an old folder whose replacement is not in place."""
    with suppress(OSError):
        restore_replaced(folder)
        remove_replaced(folder)


def _replace(staging: Path, final: Path) -> None:
    old = staging.parent / f"{final.name}.old"
    try:
        if final.exists():
            os.replace(final, old)
        os.replace(staging, final)
    except BaseException:
        # A signal may come between any two lines here.
        if old.exists() and not final.exists():
            os.replace(old, final)
        raise
    for parent in (final.parent, staging.parent):
        _flush_folder(parent)


def _flush(folder: Path) -> None:
    """Have all on disk before the rename is: a crash must not leave a renamed folder of empty files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            _flush_folder(path)
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    """Have the names in a folder on disk, where the system can: Windows opens no folders, some network disks refuse."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_write_error(error: RuntimeError) -> bool:
    """torch.save reports a full disk as a RuntimeError of its zip writer."""
    return any(word in str(error) for word in ("PytorchStreamWriter", "inline_container", "unexpected pos"))


def _cannot_save(final: Path, error: Exception) -> str:
    state = f"{final}: cannot be saved ({reason_of(error)}); {kept(final.parent)}"
    return f"{state}; {write_advice(error)} and go on with --resume"


def write_advice(error: Exception) -> str:
    """What to do where a file cannot be written; safetensors gives the number in its text, torch's zip writer none."""
    in_text = re.search(r"os error (\d+)", str(error))
    number = getattr(error, "errno", None) or (int(in_text[1]) if in_text else None)
    return "make room" if number in (None, *NO_ROOM) else "see to it that it can be written"
