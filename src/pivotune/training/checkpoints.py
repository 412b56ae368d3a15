"""Checkpoints that are whole or not there: written beside, renamed when complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import get_last_checkpoint

from pivotune.errors import UsageError

STAGING = ".saving"


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A folder to write into that becomes `final` when the block ends, and vanishes when it fails.

    An existing `final` is replaced only after the new one is complete.

    Raises:
        UsageError: the disk is full or not writable; names what is still usable.
    """
    staging = final.parent / STAGING / final.name
    if staging.parent.is_symlink():
        # What it points to is not ours to empty.
        staging.parent.unlink()
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        _flush(staging)
        _replace(staging, final)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(staging.parent, ignore_errors=True)
        if isinstance(error, RuntimeError) and not _is_write_error(error):
            raise
        raise UsageError(_cannot_save(final, error)) from error
    except BaseException:
        shutil.rmtree(staging.parent, ignore_errors=True)
        raise
    shutil.rmtree(staging.parent, ignore_errors=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return None if found is None else Path(found)


def _replace(staging: Path, final: Path) -> None:
    old = staging.parent / f"{final.name}.old"
    if final.exists():
        os.replace(final, old)
    try:
        os.replace(staging, final)
    except BaseException:
        if old.exists():
            os.replace(old, final)
        raise


def _flush(folder: Path) -> None:
    """Have the files on disk before the rename is: a crash must not leave a renamed folder of empty files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _is_write_error(error: RuntimeError) -> bool:
    """torch.save reports a full disk as a RuntimeError of its zip writer."""
    return any(word in str(error) for word in ("PytorchStreamWriter", "inline_container", "unexpected pos"))


def _cannot_save(final: Path, error: Exception) -> str:
    last = last_checkpoint(final.parent)
    usable = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
    return f"{final}: cannot be saved ({_reason(error)}); {usable}; make room and go on with --resume"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200]
