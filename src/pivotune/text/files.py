"""Write files atomically: to a temporary file in the same folder, which is then renamed."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; after an error the old file is unchanged."""
    write_pieces(path, (content,))


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file atomically from pieces, of which memory holds one; after an error the old file is unchanged."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(pieces)
            file.flush()
            # Before the rename: after a power failure the new name must not hold an empty file.
            os.fsync(file.fileno())
        apply_umask(Path(temporary))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def apply_umask(path: Path) -> None:
    """Give a file the mode of a plainly opened one: temporary files, Safetensors' too, are their owner's alone."""
    umask = os.umask(0o077)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def flush(folder: Path) -> None:
    """Flush all files of a folder to disk, before it is renamed: otherwise a crash could leave a folder of empty files.

    Safetensors' files get the mode of the others.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            if path.suffix == ".safetensors":
                apply_umask(path)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            flush_entries(path)
    flush_entries(folder)


def flush_entries(folder: Path) -> None:
    """Flush a folder's entries where the system allows it: Windows opens no folders, some network disks refuse."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically; NaN and infinity, which JSON lacks, become null."""
    write_text(path, json.dumps(finite(content), ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def json_line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line atomically; memory holds one."""
    write_pieces(path, map(json_line, records))


def write_items(path: Path, items: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, gzipped, atomically."""
    write_bytes(path, gzip.compress(b"".join(map(json_line, items))))


def finite(value: Any) -> Any:
    """Return the value with NaN and infinity, which JSON lacks, as None at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value
