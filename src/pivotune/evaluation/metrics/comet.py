"""COMET (Rei et al. 2022), the paper's metric of translation, with unbabel-comet and local weights.

Nothing is downloaded: the weights are a path, or in the Hugging Face cache of this machine.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from pivotune.errors import UsageError

DEFAULT_CHECKPOINT = "Unbabel/wmt22-comet-da"
_CHECKPOINT_FILE = "checkpoints/model.ckpt"
_BATCH_SIZE = 16


class CometUnavailableError(Exception):
    """The package or its weights are not on this machine; the message is the reason in a few words."""


def comet_scores(
    sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str], checkpoint: str | None = None
) -> list[float]:
    """Return COMET of every translation, about 0 (unrelated) to 1 (perfect).

    Args:
        checkpoint: a `.ckpt` file, a folder with `checkpoints/model.ckpt`, or a Hub name in the local cache; None for
            wmt22-comet-da, the paper's likeliest choice.

    Raises:
        CometUnavailableError: unbabel-comet or the weights are missing.
    """
    path = find_checkpoint(checkpoint)
    if not sources:
        return []
    load_from_checkpoint = import_module("comet").load_from_checkpoint
    # Versions before 2.2 lack the option, and would ask the network for the encoder's configuration.
    has_option = "local_files_only" in inspect.signature(load_from_checkpoint).parameters
    try:
        model = load_from_checkpoint(str(path), **({"local_files_only": True} if has_option else {}))
    except Exception as error:  # a broken file, another version's, an encoder that is not in the cache
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CometUnavailableError(f"{path} cannot be loaded ({reason[:200]})") from error
    columns = zip(sources, hypotheses, references, strict=True)
    samples = [{"src": source, "mt": hypothesis, "ref": reference} for source, hypothesis, reference in columns]
    gpus = int(torch.cuda.is_available())
    prediction = model.predict(samples, batch_size=_BATCH_SIZE, gpus=gpus, progress_bar=False)
    return [float(score) for score in prediction.scores]


def find_checkpoint(checkpoint: str | None = None) -> Path:
    """Return the weights' file; arguments and errors as in `comet_scores`."""
    if find_spec("comet") is None:
        raise CometUnavailableError("unbabel-comet is not installed")
    if checkpoint is not None:
        path = Path(checkpoint).expanduser()
        if path.is_file():
            return path
        if path.is_dir():
            if (path / _CHECKPOINT_FILE).is_file():
                return path / _CHECKPOINT_FILE
            raise UsageError(f"--comet {path}: has no {_CHECKPOINT_FILE}; allowed: a .ckpt file, or a folder with one")
        if path.suffix == ".ckpt" or path.is_absolute() or checkpoint.count("/") != 1:
            allowed = "allowed: a .ckpt file, a model's folder, or a Hub name"
            raise UsageError(f"--comet {checkpoint}: no such file; {allowed}")
    from huggingface_hub import snapshot_download

    name = DEFAULT_CHECKPOINT if checkpoint is None else checkpoint
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except Exception as error:  # not in the cache, or no valid name: the library's classes for it differ by version
        raise CometUnavailableError(f"the weights of {name} are not in the local cache") from error
    if not (folder / _CHECKPOINT_FILE).is_file():
        raise CometUnavailableError(f"the local cache has no {_CHECKPOINT_FILE} of {name}")
    return folder / _CHECKPOINT_FILE
