"""Pooled vectors on disk: Safetensors with what they were computed from, checked before they are used."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from pivotune.data.examples import Side
from pivotune.errors import UsageError
from pivotune.training.resilience.checkpoints import STAGING
from pivotune.training.resilience.checksums import reason_of

Vectors = dict[str, np.ndarray]
# Settings of a model that say nothing about its states.
_NO_MATTER = ("transformers_version", "architectures", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id")


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the configuration and every tensor."""
    config = cast(Any, model).config.to_dict()
    told = {name: value for name, value in config.items() if not name.startswith("_") and name not in _NO_MATTER}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def rows_digest(sides: Sequence[Side]) -> str:
    """SHA-256 over token ids and spans."""
    digest = hashlib.sha256()
    for side in sides:
        digest.update(np.array([len(side.ids), *side.query, side.answer], dtype=np.int64).tobytes())
        digest.update(side.ids.astype(np.int64).tobytes())
    return digest.hexdigest()


def _content_digest(vectors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(vectors):
        digest.update(np.ascontiguousarray(vectors[name]).data)
    return digest.hexdigest()


def why_unusable(path: Path, key: Mapping[str, str], num_rows: int) -> str | None:
    """Why the file cannot be used, in a few words; None where it can."""
    if not path.is_file():
        return "not there"
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
        changed = [name for name, value in key.items() if found.get(name) != value]
        if changed:
            return f"other {', '.join(changed)}"
        vectors = map_vectors(path)
    except (OSError, SafetensorError) as error:
        return reason_of(error)
    whole = all(table.shape[0] == num_rows for table in vectors.values())
    return None if whole and found.get("content") == _content_digest(vectors) else "damaged"


def map_vectors(path: Path) -> Vectors:
    """The tensors of a file as arrays over its mapped bytes; Safetensors' own arrays would be copies."""
    with safe_open(path, framework="pt") as file:
        return {name: cast(Tensor, file.get_tensor(name)).numpy() for name in file.keys()}  # noqa: SIM118


def save_vectors(path: Path, vectors: Vectors, key: Mapping[str, str]) -> None:
    """The whole file or nothing: written beside, renamed when it is on disk."""
    # What a killed process leaves in there, the next checkpoint removes.
    staging = path.parent / STAGING
    try:
        staging.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=staging) as folder:
            temporary = Path(folder) / path.name
            save_file(vectors, temporary, metadata={**key, "content": _content_digest(vectors)})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{path}: cannot be written ({reason_of(error)}); make room or choose another output_dir"
        ) from error
    finally:
        with suppress(OSError):
            staging.rmdir()
