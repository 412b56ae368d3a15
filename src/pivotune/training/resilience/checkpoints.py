"""Checkpoints that are complete or absent: written in a staging folder, checksummed, renamed; checked before use.

`checksums.json` holds size and SHA-256 of every file of a folder.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pivotune.errors import UsageError
from pivotune.models.locating import CHECKSUMS
from pivotune.text.files import flush, flush_entries, sha256_of
from pivotune.text.json_text import shown

logger = logging.getLogger(__name__)
STAGING = ".saving"
PASSED_OVER = "passed-over-"  # prefix of a checkpoint that a resumed run skipped
TRAINER_STATE = "trainer_state.json"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHECKPOINT = re.compile(r"checkpoint-[0-9]+")
# `save_only_model` leaves out both of these and the random state.
_STATES = ("optimizer.pt", "scheduler.pt")
# Prefixes of the same states from FSDP, DeepSpeed and XLA.
_SHARDED_STATES = ("optimizer_", "optimizer.bin", "pytorch_model_fsdp", "global_step", "rank")
# Raised for a JSON file with other content, or with endless nesting.
_MALFORMED = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)

# ---- write ----


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """Yield a folder to write into. It becomes `final` when the block ends and is removed when the block fails.

    `checksums.json` is written last. An existing `final` is replaced only after the new folder is complete.

    Raises:
        UsageError: the disk is full or not writable; names the checkpoint that can still be used.
    """
    staging = final.parent / STAGING / final.name
    if staging.parent.is_symlink():
        # The target of a link is not ours to empty.
        staging.parent.unlink()
    _discard_staged(final.parent)
    try:
        staging.mkdir(parents=True)
        yield staging
        write_checksums(staging)
        flush(staging)
        _replace(staging, final)
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError of its zip writer.
        of_writer = any(word in str(error) for word in ("PytorchStreamWriter", "inline_container", "unexpected pos"))
        if isinstance(error, RuntimeError) and not of_writer:
            raise
        raise UsageError(
            f"{final}: cannot be saved ({reason_of(error)}); {kept(final.parent)}; {write_advice(error)} and go on with "
            "--resume"
        ) from error
    finally:
        _discard_staged(final.parent)


def restore_replaced(folder: Path) -> None:
    """Undo a replacement that a kill interrupted: the old folder was moved away and the new one not yet renamed."""
    for old in (folder / STAGING).glob("*.old"):
        final = folder / old.name.removesuffix(".old")
        if not final.exists():
            os.replace(old, final)


def remove_replaced(folder: Path) -> None:
    """Remove the staging folder of a process that was killed after its last rename."""
    shutil.rmtree(folder / STAGING, ignore_errors=True)


def _discard_staged(folder: Path) -> None:
    """Empty the staging folder, except for an old folder whose replacement is not in place."""
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
        # A signal may arrive between any two lines here.
        if old.exists() and not final.exists():
            os.replace(old, final)
        raise
    for parent in (final.parent, staging.parent):
        flush_entries(parent)


def write_advice(error: Exception) -> str:
    """Return the advice for a failed write: free space, or permissions.

    safetensors puts the error number in its text; torch's zip writer gives none.
    """
    in_text = re.search(r"os error (\d+)", str(error))
    number = getattr(error, "errno", None) or (int(in_text[1]) if in_text else None)
    return "make room" if number in (None, *DISK_FULL) else "see to it that it can be written"


def reason_of(error: Exception) -> str:
    """Return the reason of a failed read or write in a few words."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200]


# ---- find ----


def checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoints of a run, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if is_checkpoint_name(path.name) and path.is_dir()]
    return sorted(found, key=_step_of, reverse=True)


def is_checkpoint_name(name: str) -> bool:
    """Return True for `checkpoint-7`, not for `checkpoint-7-backup`, which is the user's own."""
    return _CHECKPOINT.fullmatch(name) is not None


def own_checkpoint(named: str | None, folder: Path) -> Path | None:
    """Return the checkpoint that a `trainer_state.json` names, if it lies in this run's folder; None otherwise.

    Only the last part of the path counts: the run may have been moved, or the file made to point elsewhere.
    """
    path = folder / Path(named or "").name
    is_own = is_checkpoint_name(path.name) and path.is_dir() and path.resolve().parent == folder.resolve()
    return path if is_own else None


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run without reading it, or None."""
    return next(iter(checkpoints(folder)), None)


def kept(folder: Path) -> str:
    """Return the part of a message that names the checkpoint a run can go on from."""
    last = last_checkpoint(folder)
    return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"


def whole_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose checksums match, or None if the run has no checkpoint.

    Damaged checkpoints are passed over with a warning that names the checkpoint and the file.

    Raises:
        UsageError: all checkpoints are damaged.
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


def check_states(checkpoint: Path) -> None:
    """Refuse to resume from a checkpoint that holds weights only.

    Raises:
        UsageError: names the setting that left out the states.
    """
    names = [path.name for path in checkpoint.iterdir()]
    if not any(name == _STATES[0] or name.startswith(_SHARDED_STATES) for name in names):
        raise UsageError(
            f"{checkpoint} has no state of the optimizer (training.save_only_model: true), so a resumed run would be "
            "another one; begin a new run, which may start from its weights (model:)"
        )


def set_newer_aside(folder: Path, chosen: Path) -> None:
    """Rename every checkpoint that is newer than the one a run resumes from to `passed-over-checkpoint-N`.

    `save_total_limit` keeps the newest by step: a skipped checkpoint would stay, and the ones that the run saves before
    that step would be deleted. Damaged ones are kept too: a failed read may succeed later.
    """
    step = json.loads((chosen / TRAINER_STATE).read_text(encoding="utf-8"))["global_step"]
    for path in checkpoints(folder):
        if _step_of(path) <= step or path.samefile(chosen):
            return
        aside = folder / f"{PASSED_OVER}{path.name}"
        remove_folder(aside)
        os.replace(path, aside)
        message = "%s is newer than %s, which the run goes on from; it is now %s: remove it if it is of no use"
        logger.warning(message, path, chosen, aside)


def remove_folder(path: Path) -> None:
    """Remove a folder if it exists; of a link only the link."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


# ---- checksums ----


def write_checksums(folder: Path) -> None:
    """Write `checksums.json` for all files of the folder and its subfolders."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)

    def entry(path: Path) -> dict[str, Any]:
        return {"sha256": sha256_of(path), "size": path.stat().st_size}

    # hashlib releases the interpreter lock: four files at a time are read as fast as the disk allows.
    with ThreadPoolExecutor(max_workers=4) as pool:
        names = (path.relative_to(folder).as_posix() for path in paths)
        found = dict(zip(names, pool.map(entry, paths), strict=True))
    (folder / CHECKSUMS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def find_damage(folder: Path, *, needed: tuple[str, ...] = ()) -> str | None:
    """Return the first file that does not match `checksums.json` and how, or None if all files match.

    Folders of earlier versions have no `checksums.json`; for them only unreadable or missing files are found.

    Args:
        needed: files that `checksums.json` must name.
    """
    if not (folder / CHECKSUMS).exists():
        return _find_plain_damage(folder)
    expected, problem = _read(
        folder / CHECKSUMS,
        lambda found: {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in found.items()},
    )
    if problem is not None:
        return problem
    unnamed = [name for name in needed if name not in expected]
    if unnamed or not expected:
        return f"{CHECKSUMS} does not name {unnamed[0] if unnamed else 'any file'}"
    with ThreadPoolExecutor(max_workers=4) as pool:
        problems = pool.map(lambda item: _compare(folder, item[0], *item[1]), expected.items())
        return next((problem for problem in problems if problem is not None), None)


def find_checkpoint_damage(folder: Path) -> str | None:
    """Same for a checkpoint, which must also hold a readable `trainer_state.json`."""
    damage = find_damage(folder, needed=(TRAINER_STATE,))
    if damage is not None:
        return damage
    step, problem = _read(folder / TRAINER_STATE, lambda state: state["global_step"])
    return problem or (None if isinstance(step, int) else f"{TRAINER_STATE} is damaged")


def _read(path: Path, parse: Callable[[Any], Any]) -> tuple[Any, str | None]:
    """Return the parsed content of a JSON file, or the reason why there is none."""
    problem = _find_unreadable(path.parent, path.name)
    if problem is not None:
        return None, problem
    try:
        return parse(json.loads(path.read_text(encoding="utf-8"))), None
    except (OSError, UnicodeDecodeError) as error:
        return None, f"{path.name} cannot be read ({reason_of(error)})"
    except _MALFORMED:
        return None, f"{path.name} is damaged"


def _find_unreadable(folder: Path, name: str) -> str | None:
    """Return the reason not to open a file: it is missing, outside of the run, or no plain file (a pipe never ends)."""
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        return f"{CHECKSUMS} names {shown(name)}, which is not in the folder"
    path = folder / name
    try:
        if not path.exists():
            return f"{name} is missing"
        # A link within the run is allowed: it saves space.
        if not path.resolve().is_relative_to(folder.resolve().parent):
            return f"{path} is a link out of the run"
        return None if path.is_file() else f"{path} is no plain file"
    except (OSError, RuntimeError) as error:
        return f"{name} cannot be read ({reason_of(error)})"


def _compare(folder: Path, name: str, size: int, digest: str) -> str | None:
    problem = _find_unreadable(folder, name)
    if problem is not None:
        return problem
    path = folder / name
    try:
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found} bytes where {size} were written"
        return None if sha256_of(path) == digest else f"{name} is not what was written (SHA-256)"
    except OSError as error:
        return f"{name} cannot be read ({reason_of(error)})"


def _find_plain_damage(folder: Path) -> str | None:
    """Check without checksums: a Safetensors header holds its length, and one process writes its states together."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    is_sharded = any(name.startswith(_SHARDED_STATES) for name in names)
    if not is_sharded and any(name in _STATES or name.startswith("rng_state") for name in names):
        missing = [name for name in _STATES if name not in names]
        if missing:
            return f"{missing[0]} is missing"
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{path.name} cannot be read ({reason_of(error)})"
    return None
