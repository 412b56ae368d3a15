"""`checksums.json`: size and SHA-256 of every file of a folder, so that damage is seen before the folder is used."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pivotune.models.locating import CHECKSUMS
from pivotune.text.json_text import shown

# What a checkpoint of `Trainer` is read from first.
TRAINER_STATE = "trainer_state.json"
# With `save_only_model` there is neither these nor a random state.
_STATES = ("optimizer.pt", "scheduler.pt")
# How the names begin that FSDP, DeepSpeed and XLA give theirs.
_SHARDED_STATES = ("optimizer_", "optimizer.bin", "pytorch_model_fsdp", "global_step", "rank")
# Of a JSON file with another content, or nested without end.
_NOT_AS_WRITTEN = (ValueError, TypeError, KeyError, RecursionError)


def write_checksums(folder: Path) -> None:
    """Write `checksums.json` for everything that lies in the folder, subfolders too."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    # Digests let go of the interpreter: a few files at a time are read as fast as the disk gives them.
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = dict(zip((path.relative_to(folder).as_posix() for path in paths), pool.map(_entry, paths), strict=True))
    (folder / CHECKSUMS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def find_damage(folder: Path, *, needed: tuple[str, ...] = ()) -> str | None:
    """Which file of the folder is not what was written, and how; None where all are whole.

    A folder without `checksums.json` (of an earlier version) is looked at for what shows without it.

    Args:
        needed: files that were written, whatever `checksums.json` says.
    """
    if not (folder / CHECKSUMS).exists():
        return _find_plain_damage(folder)
    problem = _find_unreadable(folder, CHECKSUMS)
    if problem is not None:
        return problem
    try:
        content = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        expected = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in content.items()}
    except (OSError, UnicodeDecodeError) as error:
        return f"{CHECKSUMS} cannot be read ({reason_of(error)})"
    except (*_NOT_AS_WRITTEN, AttributeError, OverflowError):
        return f"{CHECKSUMS} is damaged"
    unnamed = [name for name in needed if name not in expected]
    if unnamed or not expected:
        return f"{CHECKSUMS} does not name {unnamed[0] if unnamed else 'any file'}"
    with ThreadPoolExecutor(max_workers=4) as pool:
        problems = pool.map(lambda item: _compare(folder, item[0], *item[1]), expected.items())
        return next((problem for problem in problems if problem is not None), None)


def find_checkpoint_damage(folder: Path) -> str | None:
    """`find_damage` of a checkpoint, which must hold a readable state of the trainer."""
    problem = find_damage(folder, needed=(TRAINER_STATE,)) or _find_unreadable(folder, TRAINER_STATE)
    if problem is not None:
        return problem
    try:
        state = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
        return None if isinstance(state["global_step"], int) else f"{TRAINER_STATE} is damaged"
    except OSError as error:
        return f"{TRAINER_STATE} cannot be read ({reason_of(error)})"
    except _NOT_AS_WRITTEN:
        return f"{TRAINER_STATE} is damaged"


def _find_unreadable(folder: Path, name: str) -> str | None:
    """Why a named file is not to be opened: it is not there, or elsewhere, or (a pipe) would never end."""
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        return f"{CHECKSUMS} names {shown(name)}, which is not in the folder"
    path = folder / name
    try:
        if not path.exists():
            return f"{name} is missing"
        # A link within the run is let through: somebody may have saved space.
        inside = path.resolve().is_relative_to(folder.resolve().parent)
        return (
            None if inside and path.is_file() else f"{path} is {'no plain file' if inside else 'a link out of the run'}"
        )
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
        return None if _sha256(path) == digest else f"{name} is not what was written (SHA-256)"
    except OSError as error:
        return f"{name} cannot be read ({reason_of(error)})"


def _find_plain_damage(folder: Path) -> str | None:
    """Safetensors say in their header how long they are, and the states of one process are always written together."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    elsewhere = any(name.startswith(_SHARDED_STATES) for name in names)
    if not elsewhere and any(name in _STATES or name.startswith("rng_state") for name in names):
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


def _entry(path: Path) -> dict[str, Any]:
    return {"sha256": _sha256(path), "size": path.stat().st_size}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason_of(error: Exception) -> str:
    """Why a file could not be read or written, in a few words."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
