"""`checksums.json`: size and SHA-256 of every file of a folder, so that damage is seen before the folder is used."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

CHECKSUMS = "checksums.json"
# What a checkpoint of `Trainer` is read from first.
TRAINER_STATE = "trainer_state.json"


def write_checksums(folder: Path) -> None:
    """Write `checksums.json` for everything that lies in the folder, subfolders too."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    # Digests let go of the interpreter: a few files at a time are read as fast as the disk gives them.
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = dict(zip((path.relative_to(folder).as_posix() for path in paths), pool.map(_entry, paths), strict=True))
    (folder / CHECKSUMS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """Which file of the folder is not what was written, and how; None where all are whole.

    A folder without `checksums.json` (of an earlier version) is looked at for what shows without it.
    """
    try:
        text = (folder / CHECKSUMS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return _find_plain_damage(folder)
    except (OSError, UnicodeDecodeError) as error:
        return f"{CHECKSUMS} cannot be read ({reason_of(error)})"
    try:
        expected = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in json.loads(text).items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{CHECKSUMS} is damaged"
    with ThreadPoolExecutor(max_workers=4) as pool:
        problems = pool.map(lambda item: _compare(folder / item[0], item[0], *item[1]), expected.items())
        return next((problem for problem in problems if problem is not None), None)


def find_checkpoint_damage(folder: Path) -> str | None:
    """`find_damage` of a checkpoint, which must hold a readable state of the trainer."""
    problem = find_damage(folder)
    if problem is not None:
        return problem
    try:
        state = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
        return None if isinstance(state["global_step"], int) else f"{TRAINER_STATE} is damaged"
    except FileNotFoundError:
        return f"{TRAINER_STATE} is missing"
    except OSError as error:
        return f"{TRAINER_STATE} cannot be read ({reason_of(error)})"
    except (ValueError, TypeError, KeyError):
        return f"{TRAINER_STATE} is damaged"


def _compare(path: Path, name: str, size: int, digest: str) -> str | None:
    try:
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found} bytes where {size} were written"
        return None if _sha256(path) == digest else f"{name} is not what was written (SHA-256)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({reason_of(error)})"


def _find_plain_damage(folder: Path) -> str | None:
    """Safetensors say in their header how long they are."""
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
