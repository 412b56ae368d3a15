"""Arrays computed once from the starting model and kept in the run folder, used again if nothing they depend on changed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from pivotune.errors import UsageError
from pivotune.text.files import apply_umask
from pivotune.training.resilience.checkpoints import STAGING, reason_of

logger = logging.getLogger(__name__)
# Settings of a model that do not change its states.
_IRRELEVANT = ("transformers_version", "architectures", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id")
Arrays = dict[str, np.ndarray]


def can_be_reused(path: Path, key: Mapping[str, str]) -> bool:
    """Return True if the file is whole and was computed for `key`; log a line on reuse, and on why not."""
    problem = _unusable_reason(path, key)
    if problem is None:
        logger.info("%s: used again", path)
    elif path.exists():
        logger.warning("%s: computed again (%s)", path, problem)
    return problem is None


def _unusable_reason(path: Path, key: Mapping[str, str]) -> str | None:
    """Return the reason in a few words why the file cannot be used; None where it can."""
    if not path.is_file():
        return "not there"
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
        changed = [name for name, value in key.items() if found.get(name) != value]
        if changed:
            return f"other {', '.join(changed)}"
        arrays = map_arrays(path)
    except (OSError, SafetensorError) as error:
        return reason_of(error)
    return None if found.get("content") == _content_digest(arrays) else "damaged"


def map_arrays(path: Path) -> Arrays:
    """Return the tensors of a file as arrays over its mapped bytes; Safetensors' own arrays would be copies."""
    with safe_open(path, framework="pt") as file:
        return {name: cast(Tensor, file.get_tensor(name)).numpy() for name in file.keys()}  # noqa: SIM118


def save_arrays(path: Path, arrays: Arrays, key: Mapping[str, str]) -> None:
    """Write the whole file or nothing."""
    # The next checkpoint removes the leftovers of a killed process from the staging folder.
    staging = path.parent / STAGING
    try:
        staging.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=staging) as folder:
            temporary = Path(folder) / path.name
            save_file(arrays, temporary, metadata={**key, "content": _content_digest(arrays)})
            apply_umask(temporary)
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


def key_of(model: nn.Module, rows: str, settings: Mapping[str, Any], *, version: str) -> dict[str, str]:
    """Return everything that arrays depend on, as the file's metadata.

    Args:
        rows: digest of the rows.
        version: of the computation; arrays of another one are computed again.
    """
    weights, text = weights_digest(model), json.dumps(settings, sort_keys=True)
    return {"format": version, "weights": weights, "rows": rows, "settings": text}


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of the configuration and every tensor."""
    config = cast(Any, model).config.to_dict()
    relevant = {name: value for name, value in config.items() if not name.startswith("_") and name not in _IRRELEVANT}
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _content_digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
