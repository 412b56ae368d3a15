"""COMET (Rei et al. 2022), the paper's measure of translation, where unbabel-comet and its weights are at hand.

Nothing is downloaded: the weights are a path, or in the Hugging Face cache of this machine.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pivotune.errors import UsageError

DEFAULT_CHECKPOINT = "Unbabel/wmt22-comet-da"
_CHECKPOINT_FILE = "checkpoints/model.ckpt"


class CometUnavailableError(Exception):
    """Why COMET is left out, in a few words: the package or its weights are not on this machine."""


def comet_scores(
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[str],
    checkpoint: str | None = None,
    *,
    batch_size: int = 16,
) -> list[float]:
    """COMET of every translation, about 0 (unrelated) to 1 (perfect).

    Args:
        sources, hypotheses, references: sentence by sentence.
        checkpoint: a `.ckpt` file, a folder that has `checkpoints/model.ckpt`, or a Hub name whose files are in the local
            cache; None for wmt22-comet-da, the paper's likeliest choice.

    Raises:
        CometUnavailableError: unbabel-comet or the weights are not here.
        UsageError: a path that is no checkpoint.
    """
    assert len(sources) == len(hypotheses) == len(references)
    path = find_checkpoint(checkpoint)
    if not sources:
        return []
    model = _load(path)
    columns = zip(sources, hypotheses, references, strict=True)
    samples = [{"src": source, "mt": hypothesis, "ref": reference} for source, hypothesis, reference in columns]
    prediction = model.predict(samples, batch_size=batch_size, gpus=_gpus(), progress_bar=False)
    return [float(score) for score in prediction.scores]


def find_checkpoint(checkpoint: str | None = None) -> Path:
    """The weights' file; arguments and errors as in `comet_scores`."""
    if find_spec("comet") is None:
        raise CometUnavailableError("unbabel-comet is not installed")
    if checkpoint is None:
        return _cached(DEFAULT_CHECKPOINT)
    path = Path(checkpoint).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return _in_folder(path)
    if path.suffix == ".ckpt" or path.is_absolute() or checkpoint.count("/") != 1:
        raise UsageError(f"--comet {checkpoint}: no such file; allowed: a .ckpt file, a model's folder, or a Hub name")
    return _cached(checkpoint)


def _in_folder(folder: Path) -> Path:
    found = folder / _CHECKPOINT_FILE
    if not found.is_file():
        raise UsageError(f"--comet {folder}: has no {_CHECKPOINT_FILE}; allowed: a .ckpt file, or a folder with one")
    return found


def _cached(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, local_files_only=True)
    except Exception as error:  # not in the cache, or no valid name: the library's classes for it differ by version
        raise CometUnavailableError(f"the weights of {name} are not in the local cache") from error
    found = Path(folder) / _CHECKPOINT_FILE
    if not found.is_file():
        raise CometUnavailableError(f"the local cache has no {_CHECKPOINT_FILE} of {name}")
    return found


def _load(path: Path) -> Any:
    load_from_checkpoint = import_module("comet").load_from_checkpoint
    # Versions before 2.2 lack the option, and would ask the network for the encoder's configuration.
    offline = {"local_files_only": True} if "local_files_only" in _parameters(load_from_checkpoint) else {}
    try:
        return load_from_checkpoint(str(path), **offline)
    except Exception as error:  # a broken file, another version's, an encoder that is not in the cache
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CometUnavailableError(f"{path} cannot be loaded ({reason[:200]})") from error


def _parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def _gpus() -> int:
    import torch

    return int(torch.cuda.is_available())
