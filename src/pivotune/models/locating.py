"""Find a model's files in a folder, a run folder, the Hub or its cache, and check that none is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
from typing import Any

from pivotune.errors import UsageError
from pivotune.models.bundled import BUNDLED_MODELS, PREFIX, bundled_model_folder

OFFLINE_MODEL = f"{PREFIX}{next(iter(BUNDLED_MODELS))}"
# Written by a run beside the files of a folder (pivotune.training.resilience.checkpoints): name -> size and SHA-256.
CHECKSUMS = "checksums.json"
_CONFIG = "config.json"
_ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt"}
_HUB_TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class ModelFiles:
    """A model's location (folder or Hub name), the names of its files, and arguments of `from_pretrained` to read them."""

    location: str
    names: frozenset[str]
    arguments: dict[str, Any]

    @property
    def is_adapter(self) -> bool:
        return _ADAPTER_CONFIG in self.names


def resolve_model(name: str) -> str:
    """Return a folder path or Hub name for `from_pretrained`; a Hub name is not looked up here.

    Bundled models become their cached folder (converted on first use), run folders their `model/`; other existing
    folders are checked for a configuration and weights.

    Raises:
        UsageError: unknown bundled name; a file; a folder without a model; neither a folder nor a possible Hub name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if name.startswith(PREFIX):
        return str(bundled_model_folder(name))
    path = Path(name).expanduser()
    if name and path.is_dir():
        folder = _folder_in_run(path)
        _check_files(str(folder), _file_names(folder))
        _check_weights(folder)
        return str(folder)
    if path.is_file():
        raise UsageError(f"{name}: this is a file; allowed: a model folder, a run folder, a Hub name, {OFFLINE_MODEL}")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(
            f"{name or '(empty model name)'}: no such folder; "
            f"allowed: a model folder, a run folder, a Hub name (owner/model), {OFFLINE_MODEL}"
        ) from error
    return name


def locate(name: str, revision: str | None) -> ModelFiles:
    """Find a model's files, looking a Hub name up; of an adapter its own files, not its base model's.

    Raises:
        UsageError: as `resolve_model`; Hub name or revision not found, no configuration or no safetensors.
    """
    location = resolve_model(name)
    if Path(location).is_dir():
        return ModelFiles(location, _file_names(Path(location)), {})
    names = _names_on_hub(location, revision)
    arguments: dict[str, Any] = {} if revision is None else {"revision": revision}
    if names is None:
        # Out of reach: reading only the cache saves the Hub client's retries, half a minute for each file.
        names = _names_in_hub_cache(location, revision)
        arguments["local_files_only"] = True
    _check_files(location, names)
    return ModelFiles(location, names, arguments)


def tokenizer_files(name: str, revision: str | None) -> ModelFiles:
    """Find a model's tokenizer; of an adapter without one, its base model's.

    Raises:
        UsageError: as `locate`; no tokenizer beside the model.
    """
    files = locate(name, revision)
    if _TOKENIZER_FILES & files.names:
        return files
    if files.is_adapter:
        base, base_revision = base_of(name, files)
        with about_base_of(name):
            return tokenizer_files(base, base_revision)
    raise UsageError(f"{name}: no tokenizer beside the model; looked for {', '.join(sorted(_TOKENIZER_FILES))}")


def base_of(name: str, files: ModelFiles) -> tuple[str, str | None]:
    """Return name and revision of an adapter's base model."""
    from huggingface_hub import hf_hub_download

    with one_line_errors(name, _ADAPTER_CONFIG):
        path = Path(files.location) / _ADAPTER_CONFIG
        if not path.is_file():
            path = Path(hf_hub_download(files.location, _ADAPTER_CONFIG, **files.arguments))
        adapter = json.loads(path.read_text(encoding="utf-8"))
    base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
    if not base or not isinstance(base, str):
        raise UsageError(f"{name}: {_ADAPTER_CONFIG} does not name the base model (base_model_name_or_path)")
    return base, adapter.get("revision")


# --- names ---------------------------------------------------------------------------------------------------------


def _folder_in_run(path: Path) -> Path:
    """Return `model/` of a run folder, else the folder itself."""
    if not (path / "config.yaml").is_file() or (path / _CONFIG).is_file():
        return path
    if (path / "model").is_dir():
        return path / "model"
    checkpoints = ", ".join(sorted(entry.name for entry in path.glob("checkpoint-*"))) or "none yet"
    raise UsageError(f"{path}: a run folder without model/: the run has not finished (its checkpoints: {checkpoints})")


def _file_names(folder: Path) -> frozenset[str]:
    return frozenset(entry.name for entry in folder.iterdir())


@lru_cache(maxsize=32)
def _names_on_hub(name: str, revision: str | None) -> frozenset[str] | None:
    """Return the names of a Hub model's files, or None if the Hub is out of reach. One request for each process."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(name, revision=revision, timeout=_HUB_TIMEOUT_SECONDS)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UsageError(_explain(name, error, "model")) from error
    except Exception:  # the errors of the Hub client's HTTP library have no public type
        return None
    return frozenset(file.rfilename for file in info.siblings or ())


def _names_in_hub_cache(name: str, revision: str | None) -> frozenset[str]:
    from huggingface_hub import try_to_load_from_cache

    for filename in (_CONFIG, _ADAPTER_CONFIG):
        cached = try_to_load_from_cache(name, filename, revision=revision)
        if isinstance(cached, str):
            return _file_names(Path(cached).parent)
    raise UsageError(
        f"{name}: no such folder, and the Hugging Face Hub is out of reach (offline?) and its cache here does not "
        f"hold this model; {OFFLINE_MODEL} needs no network"
    )


# --- checks --------------------------------------------------------------------------------------------------------


def _check_files(location: str, names: frozenset[str]) -> None:
    if _CONFIG not in names and _ADAPTER_CONFIG not in names:
        raise UsageError(f"{location}: not a model: neither {_CONFIG} nor {_ADAPTER_CONFIG} is there")
    wanted = ("adapter_model.safetensors",) if _ADAPTER_CONFIG in names else _WEIGHTS
    if not names.isdisjoint(wanted):
        return
    if pickles := sorted(name for name in names - {"training_args.bin"} if name.endswith(_PICKLE_SUFFIXES)):
        # The Hub's conversion bot offers the weights in safetensors as a pull request of many such models.
        on_hub = "" if Path(location).is_dir() else "name a revision that has safetensors (such as refs/pr/N), or "
        raise UsageError(
            f"{location}: only safetensors are read and the weights are a pickle ({pickles[0]}); {on_hub}convert them "
            "with transformers (a translation model with AutoModelForSeq2SeqLM): "
            f"AutoModelForCausalLM.from_pretrained({location!r}).save_pretrained('new-folder')"
        )
    raise UsageError(f"{location}: no weights; looked for {' or '.join(wanted)}")


def _check_weights(folder: Path) -> None:
    """Check that no shard is missing, and the sizes that a run recorded; configuration and tokenizer may be edited."""
    single, index = (folder / name for name in _WEIGHTS)
    if index.is_file() and not single.is_file():
        shards = read_shards(index)
        if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
            raise UsageError(f"{folder}: {len(missing)} of {len(shards)} weight files are missing, first {missing[0]}")
    try:
        recorded = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        sizes = {str(name): entry["size"] for name, entry in recorded.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return
    for entry in folder.glob("*.safetensors"):
        found, written = entry.stat().st_size, sizes.get(entry.name)
        if written not in (None, found):
            raise UsageError(
                f"{entry}: damaged, {found} bytes where {written} were written; train or copy it again, or remove "
                f"{CHECKSUMS} if it was changed on purpose"
            )


def read_shards(index: Path) -> set[str]:
    """Return the names of the weight files that an index lists: safetensors files beside it.

    Raises:
        UsageError: no readable index, or a shard that is a path, or of another format.
    """
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{index}: not a readable list of shards ({error})") from error
    for shard in sorted(shards, key=str):
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise UsageError(f"{index}: the shard {shard!r} is not a file beside it; allowed: plain file names")
        if not shard.endswith(".safetensors"):
            raise UsageError(f"{index}: the shard {shard!r} is not read; allowed: .safetensors")
    return shards


def check_index(files: ModelFiles, named: str | None) -> None:
    """Check the shards of a Hub model, or of the index that `config.json` names (`transformers_weights`)."""
    from huggingface_hub import hf_hub_download

    single, index = _WEIGHTS
    name = named or (index if single not in files.names and index in files.names else "")
    if not name.endswith(".index.json"):
        return
    folder = Path(files.location)
    with one_line_errors(files.location, name):
        read_shards(folder / name if folder.is_dir() else Path(hf_hub_download(str(folder), name, **files.arguments)))


def stores_another_head(folder: Path, shape: tuple[int, int]) -> bool:
    """Return True if a folder's weights hold a head that differs from the embedding: two unlike matrices of this shape.

    Args:
        folder: a Hub name's files are not read.
        shape: (vocabulary, width) of both.
    """
    from safetensors import safe_open

    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            found += [(path, name) for name in names if tuple(file.get_slice(name).get_shape()) == shape]
    if len(found) < 2:
        return False
    import torch

    matrices = []
    for path, name in found[:2]:
        with safe_open(path, framework="pt") as file:
            matrices.append(file.get_tensor(name))
    return not torch.equal(*matrices)


# --- errors --------------------------------------------------------------------------------------------------------


@contextmanager
def one_line_errors(name: str, part: str) -> Iterator[None]:
    """Turn errors of Transformers, PEFT and the Hub client about unusable files or options into one line.

    `part` is the part that cannot be loaded, for the message: `model`, `tokenizer`...
    """
    from safetensors import SafetensorError

    expected = (OSError, ValueError, KeyError, TypeError, ImportError, SafetensorError)
    try:
        yield
    except Exception as error:
        # `tokenizers` raises bare `Exception` for a damaged tokenizer.json; any other subclass has another cause.
        if isinstance(error, UsageError) or not (isinstance(error, expected) or type(error) is Exception):
            raise
        raise UsageError(_explain(name, error, part)) from error


@contextmanager
def about_base_of(name: str) -> Iterator[None]:
    """Add the adapter's name to errors about its base model."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{name}: its base model: {error}") from error


def _explain(name: str, error: BaseException, part: str) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    of_hub = {
        GatedRepoError: "a gated model: accept its terms on its Hub page, then log in with `hf auth login`",
        RepositoryNotFoundError: "no such folder, and no such model on the Hugging Face Hub (a private one needs "
        f"`hf auth login`); {OFFLINE_MODEL} needs neither",
        RevisionNotFoundError: "the Hugging Face Hub has no such revision of this model",
    }
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    for kind, text in of_hub.items():
        if any(isinstance(cause, kind) for cause in causes):
            return f"{name}: {text}"
    if "trust_remote_code" in str(error):
        return f"{name}: it needs code of its own to be run; set trust_remote_code to true if you trust its author"
    reason = shorten(str(error), width=300) or type(error).__name__
    return f"{name}: the {part} cannot be loaded: {reason}"
