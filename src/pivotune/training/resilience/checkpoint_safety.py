"""Whether a checkpoint may be read: run folders travel, and pickled files in them could hold code.

Weights are Safetensors. Optimizer, scheduler and random states are files of `torch.save`; Transformers reads them with
`weights_only=True`, which builds tensors and plain values and nothing else. Two readers are not that careful:
`torch.distributed.checkpoint` (FSDP) unpickles `.metadata` and the plain values in its `.distcp` files, and DeepSpeed its
states. So everything is read here first in the careful way, before anything else is loaded; big tensors are only mapped.
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
_UNREAD = "training_args.bin"  # written by other trainers; nothing here reads it
_ZIP = b"PK\x03\x04"
# DeepSpeed keeps instances of its own classes (ZeroStageEnum, LossScaler...) in its states.
_DEEPSPEED = re.compile(r"deepspeed(\.\w+)+\.([A-Z]\w*|fragment_address)")
_CHECKPOINT_NAME = re.compile(r"checkpoint-\d+")


class _Sealed:
    """Stands for a value that the check does not need: anything may be made of it, and nothing is kept."""

    __slots__ = ()

    def __call__(self, *_: Any) -> _Sealed:
        return _Sealed()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state where none is written")


class _Record:
    """Stands for an object with named values; those of a pickle come as one dictionary, never through a constructor."""

    def __new__(cls) -> _Record:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict:
            raise pickle.UnpicklingError("a state that is no dictionary")
        vars(self).update(state)


class _Properties(_Record):
    """Of a tensor: their state is a tuple that assigns five of them, and is not needed."""

    def __setstate__(self, state: Any) -> None:
        pass


class _BytesRecord(_Record):
    """What is not a tensor."""


class _Items(dict):
    """Stands for a dictionary that keeps its order."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state where none is written")


# The names that metadata may hold, and what stands for each. Their own classes are never handed out: a pickle can give
# a state to a class as well (`BUILD`), and would change it for the whole process.
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
    """Refuse a checkpoint that would run code when it is read, or that reads from elsewhere.

    A file that breaks off is left to its reader where that one is careful too.

    Raises:
        UsageError: a pickle with anything but tensors and plain values, a link or a shard that leads out of the run.
    """
    run = checkpoint.parent.resolve()
    # Before the first file is read: nothing in one decides whether another is looked at.
    paths = sorted(checkpoint.rglob("*"))
    for path in paths:
        _check_inside(path, run)
    saved = [path for path in paths if path.suffix in _SUFFIXES and path.name != _UNREAD and path.is_file()]
    distributed = [path for path in paths if path.name.endswith(".metadata")]
    for path in saved:
        _check_saved(path)
    for path in distributed:
        _check_distributed(path)
    if (index := checkpoint / SAFE_WEIGHTS_INDEX_NAME).is_file():
        read_shards(index)


def own_checkpoint(named: str | None, folder: Path) -> Path | None:
    """The checkpoint of this run that `trainer_state.json` names as the best; None where it is not in this run's folder.

    Only its last part counts: the run may have been moved, and the file may have been made to point elsewhere.
    """
    name = Path(named or "").name
    path = folder / name
    if _CHECKPOINT_NAME.fullmatch(name) and path.is_dir() and path.resolve().parent == folder.resolve():
        return path
    return None


def _check_inside(path: Path, run: Path) -> None:
    if path.is_symlink() and not path.resolve().is_relative_to(run):
        raise UsageError(f"{path}: a link to {path.resolve()}, outside of the run; replace it with what it points to")


def _check_saved(path: Path) -> None:
    """A file of `torch.save`."""
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP)) == _ZIP
    try:
        _load_plain(path, mmap=is_zip)
    except Exception as error:
        # A zip file that breaks off is damaged, and its reader as careful. DeepSpeed's is not.
        damaged = is_zip and not isinstance(error, pickle.UnpicklingError) and not _is_of_deepspeed(path)
        if not (damaged or (is_zip and _is_of_deepspeed(path) and _only_deepspeed(path))):
            raise _unsafe(path) from error


def _is_of_deepspeed(path: Path) -> bool:
    return path.parent.name.startswith("global_step")


def _only_deepspeed(path: Path) -> bool:
    try:
        names = get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # whatever cannot be parsed is not known to be harmless
        return False
    return bool(names) and all(map(_is_class_of_deepspeed, names))


def _is_class_of_deepspeed(name: str) -> bool:
    """Whether it is defined there: its modules import others, which a name with more dots would reach."""
    module_name, _, class_name = name.rpartition(".")
    if not _DEEPSPEED.fullmatch(name):
        return False
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except Exception:  # a module of an untrusted name may fail in any way
        return False
    return isinstance(found, type) and found.__module__.startswith("deepspeed.")


def _check_distributed(path: Path) -> None:
    """The metadata of a `torch.distributed.checkpoint`, and the plain values that it says are in the files beside it."""
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        for values in _plain_values(metadata, path.parent):
            _load_plain(values)
    except Exception as error:
        # Its reader is not careful, so that what cannot be read here must not be read there.
        raise _unsafe(path) from error


def _plain_values(metadata: Any, folder: Path) -> Iterator[io.BytesIO]:
    """What is not a tensor: each a `torch.save` of its own within a file."""
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
        # Legacy files make torch speak of its deprecated storages.
        warnings.simplefilter("ignore")
        torch.load(source, map_location="cpu", weights_only=True, mmap=mmap or None)


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the few names that a checkpoint's metadata consists of, and refuses all others."""

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
