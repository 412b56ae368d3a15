"""Refuse checkpoints that would run code when they are read: run folders are copied around, and pickles can hold code.

Weights are Safetensors. Optimizer, scheduler and random states are files of `torch.save`, which Transformers reads with
`weights_only=True`: tensors and plain values only. Two readers unpickle anything: `torch.distributed.checkpoint` (FSDP)
`.metadata` and the plain values in its `.distcp` files, and DeepSpeed its states. So this file reads everything with
`weights_only=True` before anything else is loaded. Big tensors are only mapped.
"""

from __future__ import annotations

import importlib
import io
import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from pivotune.errors import UsageError
from pivotune.models.locating import read_shards

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_UNREAD = "training_args.bin"  # of other trainers; never read here
_ZIP = b"PK\x03\x04"
# DeepSpeed keeps instances of its own classes (ZeroStageEnum, LossScaler...) in its states.
_DEEPSPEED = re.compile(r"deepspeed(\.\w+)+\.([A-Z]\w*|fragment_address)")


class _Sealed:
    """Stand-in for a value that the check does not need: accepts any arguments and keeps nothing."""

    __slots__ = ()

    def __call__(self, *_: Any) -> _Sealed:
        return _Sealed()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state where none is written")


class _Record:
    """Stand-in for an object with named values, which a pickle sets as one dictionary, never through a constructor."""

    def __new__(cls) -> _Record:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict:
            raise pickle.UnpicklingError("a state that is no dictionary")
        vars(self).update(state)


class _Properties(_Record):
    """Stand-in for the properties of a tensor, whose state is a tuple that the check does not need."""

    def __setstate__(self, state: Any) -> None:
        pass


class _BytesRecord(_Record):
    """Stand-in for a value that is not a tensor."""


class _Items(dict):
    """Stand-in for an ordered dictionary."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state where none is written")


# The names that metadata may hold, and their stand-ins. The real classes are never used: a pickle can set the state of a
# class too (`BUILD`), which would change it for the whole process.
_METADATA = "torch.distributed.checkpoint.metadata"
_STAND_INS: dict[str, dict[str, Any]] = {
    _METADATA: {
        **dict.fromkeys(
            ("Metadata", "ChunkStorageMetadata", "TensorStorageMetadata", "MetadataIndex", "StorageMeta"), _Record
        ),
        "BytesStorageMetadata": _BytesRecord,
        "TensorProperties": _Properties,
        "_MEM_FORMAT_ENCODING": _Sealed(),
    },
    "torch.distributed.checkpoint.filesystem": dict.fromkeys(("_StorageInfo", "_StoragePrefix"), _Record),
    "torch.serialization": {"_get_layout": _Sealed()},
    "torch": dict.fromkeys(
        ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))), _Sealed()
    ),
    "pathlib": (_paths := dict.fromkeys(("Path", "PosixPath", "PurePosixPath"), _Sealed())),
    "pathlib._local": _paths,  # Python 3.13
    "collections": {"OrderedDict": _Items},
}


def check_checkpoint(checkpoint: Path) -> None:
    """Refuse a checkpoint that would run code when it is read, or that leads outside of the run.

    A truncated file is left to its reader if that reader uses `weights_only=True` too.

    Raises:
        UsageError: a pickle with anything but tensors and plain values, a link or a shard that leads out of the run.
    """
    run = checkpoint.parent.resolve()
    # Listed before the first file is read: no content decides if another file is checked.
    paths = sorted(checkpoint.rglob("*"))
    for path in paths:
        if path.is_symlink() and not path.resolve().is_relative_to(run):
            raise UsageError(
                f"{path}: a link to {path.resolve()}, outside of the run; replace it with what it points to"
            )
    saved = [path for path in paths if path.suffix in _SUFFIXES and path.name != _UNREAD and path.is_file()]
    distributed = [path for path in paths if path.name.endswith(".metadata")]
    for path in saved:
        _check_saved(path)
    for path in distributed:
        _check_distributed(path)
    if (index := checkpoint / SAFE_WEIGHTS_INDEX_NAME).is_file():
        read_shards(index)


def _check_saved(path: Path) -> None:
    """Read a file of `torch.save`."""
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP)) == _ZIP
    try:
        _load_plain(path, mmap=is_zip)
    except Exception as error:
        # A truncated zip file is only damaged, unless DeepSpeed reads it.
        damaged = is_zip and not isinstance(error, pickle.UnpicklingError) and not _is_of_deepspeed(path)
        if not (damaged or (is_zip and _is_of_deepspeed(path) and _only_deepspeed(path))):
            raise _unsafe(path) from error


def _is_of_deepspeed(path: Path) -> bool:
    return path.parent.name.startswith("global_step")


def _only_deepspeed(path: Path) -> bool:
    try:
        names = get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # content that cannot be parsed may be harmful
        return False
    return bool(names) and all(map(_is_class_of_deepspeed, names))


def _is_class_of_deepspeed(name: str) -> bool:
    """Return True for a class that DeepSpeed defines: a name with more dots would reach modules that it imports."""
    module_name, _, class_name = name.rpartition(".")
    if not _DEEPSPEED.fullmatch(name):
        return False
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except Exception:  # a module of an untrusted name may fail in any way
        return False
    return isinstance(found, type) and found.__module__.startswith("deepspeed.")


def _check_distributed(path: Path) -> None:
    """Read the metadata of a `torch.distributed.checkpoint`, and the plain values that it lists in other files."""
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        for values in _plain_values(metadata, path.parent):
            _load_plain(values)
    except Exception as error:
        # Its reader unpickles anything, so a file that cannot be read here must not reach it.
        raise _unsafe(path) from error


def _plain_values(metadata: Any, folder: Path) -> Iterator[io.BytesIO]:
    """Yield the values that are not tensors, each a `torch.save` of its own within a file."""
    for index, place in metadata.storage_data.items():
        name = place.relative_path
        if Path(name).name != name or getattr(place, "transform_descriptors", None):
            raise pickle.UnpicklingError(f"{name} is not a plain file beside the metadata")
        if isinstance(metadata.state_dict_metadata.get(index.fqn), _BytesRecord):
            with (folder / name).open("rb") as file:
                file.seek(place.offset)
                yield io.BytesIO(file.read(place.length))


def _load_plain(source: Any, *, mmap: bool = False) -> None:
    with safe_globals(), warnings.catch_warnings():
        # torch warns about the deprecated storages of legacy files.
        warnings.simplefilter("ignore")
        torch.load(source, map_location="cpu", weights_only=True, mmap=mmap or None)


class _MetadataUnpickler(pickle.Unpickler):
    """Load the few names that a checkpoint's metadata consists of, and refuse all others."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _STAND_INS[module_name][global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not allowed") from None


def _unsafe(path: Path) -> UsageError:
    return UsageError(
        f"{path}: not read: it is damaged, or a pickle that holds more than tensors and plain values and could run code; "
        "remove this checkpoint to go on from an earlier one"
    )
