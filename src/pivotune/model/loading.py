"""Find, check and load models and tokenizers by name.

A name is one of: `bundled:smollm2-135m-instruct`; a folder in Hugging Face form; a PEFT adapter folder
(`adapter_config.json`), which stands for its base model with the adapter on top; a run folder, of which `model/` is
meant; a Hugging Face Hub name. Only safetensors are read. Everything that can be known without loading weights is
checked first, and every mistake is one line.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal

from pivotune.errors import UsageError
from pivotune.model.bundled import BUNDLED_MODELS, PREFIX, bundled_model_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16")
OFFLINE_MODEL = f"{PREFIX}{next(iter(BUNDLED_MODELS))}"
_CONFIG = "config.json"
_ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors",)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt"}
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")
_HUB_TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class _ModelFiles:
    """Where a model is, the names of its files, and what `from_pretrained` must be told to read them there."""

    location: str
    names: frozenset[str]
    arguments: dict[str, Any]

    @property
    def is_adapter(self) -> bool:
        return _ADAPTER_CONFIG in self.names

    @property
    def has_tokenizer(self) -> bool:
        return bool(_TOKENIZER_FILES & self.names)


def resolve_model(name: str) -> str:
    """What `from_pretrained` takes for `name`: a folder path, or the Hub name itself (not looked up here).

    Bundled models become their cached folder (converted on first use), run folders their `model/`; other existing
    folders are checked for a configuration and weights.

    Raises:
        UsageError: unknown bundled name; a file; a folder without a model; neither a folder nor a possible Hub name.
    """
    if name.startswith(PREFIX):
        return str(bundled_model_folder(name))
    path = Path(name).expanduser()
    if name and path.is_dir():
        folder = _folder_in_run(path)
        _check_files(str(folder), _file_names(folder))
        _check_shards(folder)
        return str(folder)
    if path.is_file():
        raise UsageError(f"{name}: this is a file; allowed: a model folder, a run folder, a Hub name, {OFFLINE_MODEL}")
    if not _is_possible_hub_name(name):
        raise UsageError(
            f"{name or '(empty model name)'}: no such folder; "
            f"allowed: a model folder, a run folder, a Hub name (owner/model), {OFFLINE_MODEL}"
        )
    return name


def read_config(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> PretrainedConfig:
    """Configuration of a causal language model; of an adapter, that of its base model. Loads no weights.

    Raises:
        UsageError: no such folder or Hub name, Hub out of reach and model not in its cache, gated repository, no
            configuration, no safetensors (or a missing shard), an encoder-decoder or another non-causal model.
    """
    from transformers import AutoConfig

    files = _locate(name, revision)
    if files.is_adapter:
        base, base_revision = _base_of(name, files)
        with _about_base_of(name):
            return read_config(base, trust_remote_code=trust_remote_code, revision=base_revision)
    with _one_line_errors(name, "configuration"):
        config = AutoConfig.from_pretrained(files.location, trust_remote_code=trust_remote_code, **files.arguments)
    _check_causal(name, config)
    return config


def check_model(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> None:
    """Raise what loading `name` would raise, as far as it shows without reading weights or the tokenizer.

    Raises:
        UsageError: as `read_config`; also when no tokenizer is beside the model.
    """
    read_config(name, trust_remote_code=trust_remote_code, revision=revision)
    _tokenizer_files(name, revision)


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Tokenizer of a model (of an adapter without one: of its base), padding on the right.

    A tokenizer without a padding token pads with its end-of-text token. So the padding id never says what is padding:
    masks and labels must be built from lengths, as the collator does, or the model would not learn to stop. A chat
    template that ends turns with another token than `eos_token` is left as it is.

    Raises:
        UsageError: as `check_model`; no end-of-text token; unreadable tokenizer files.
    """
    from transformers import AutoTokenizer

    files = _tokenizer_files(name, revision)
    with _one_line_errors(name, "tokenizer"), _quiet_transformers(files):
        tokenizer = AutoTokenizer.from_pretrained(
            files.location, trust_remote_code=trust_remote_code, **files.arguments
        )
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"{name}: the tokenizer has no end-of-text token, so no answer could end; "
            'set "eos_token" in its tokenizer_config.json'
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_model(
    name: str,
    *,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    attn_implementation: str | None = None,
    quantize: Literal["4bit"] | None = None,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode; an adapter as a frozen `PeftModel` on its base.

    Args:
        name: any form the module docstring names.
        dtype: of the weights; `auto` keeps the one they are stored in.
        revision: branch, tag or commit on the Hub; without meaning for folders.
        attn_implementation: Transformers' option of that name (`sdpa`, `eager`, `flash_attention_2`...).
        quantize: `4bit` loads NF4 weights (QLoRA, Dettmers et al. 2023) through bitsandbytes; needs CUDA.

    Raises:
        UsageError: as `check_model`; unknown option values; weights that are damaged, missing or of another shape.
    """
    options = _loading_options(dtype, attn_implementation, quantize)
    return _load(name, revision, {"trust_remote_code": trust_remote_code, **options})


def _load(name: str, revision: str | None, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    files = _locate(name, revision)
    if files.is_adapter:
        return _load_adapter(name, files, options)
    read_config(name, trust_remote_code=options["trust_remote_code"], revision=revision)
    with _one_line_errors(name, "model"), _quiet_transformers(files):
        # Transformers declares one return type; with `output_loading_info` it is a pair.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            files.location,
            use_safetensors=True,
            output_loading_info=True,
            # Reported in `report` and refused below, instead of a RuntimeError of many lines.
            ignore_mismatched_sizes=True,
            **options,
            **files.arguments,
        )
    model, report = loaded
    _check_complete(name, report)
    return model


def _load_adapter(name: str, files: _ModelFiles, options: dict[str, Any]) -> Any:
    from peft import PeftModel

    base, base_revision = _base_of(name, files)
    with _about_base_of(name):
        model = _load(base, base_revision, options)
    with _one_line_errors(name, "adapter"):
        return PeftModel.from_pretrained(model, files.location, is_trainable=False, **files.arguments)


def _loading_options(dtype: str, attn_implementation: str | None, quantize: str | None) -> dict[str, Any]:
    import torch

    if dtype not in DTYPES:
        raise UsageError(f"dtype: {dtype!r} found; allowed: {', '.join(DTYPES)}")
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantize is not None:
        options["quantization_config"] = _quantization_config(quantize)
    return options


def _quantization_config(quantize: str) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if quantize != "4bit":
        raise UsageError(f"quantize: {quantize!r} found; allowed: 4bit, or leave it out")
    if not torch.cuda.is_available():
        raise UsageError("quantize: 4bit needs a CUDA device and none is found; leave it out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("quantize: 4bit needs the package bitsandbytes: pip install bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


# --- where the files are -------------------------------------------------------------------------------------------


def _locate(name: str, revision: str | None) -> _ModelFiles:
    location = resolve_model(name)
    if Path(location).is_dir():
        return _ModelFiles(location, _file_names(Path(location)), {})
    names = _names_on_hub(location, revision)
    arguments: dict[str, Any] = {} if revision is None else {"revision": revision}
    if names is None:
        # Out of reach: reading only the cache saves the Hub client's retries, half a minute for each file.
        names = _names_in_hub_cache(location, revision)
        arguments["local_files_only"] = True
    _check_files(location, names)
    return _ModelFiles(location, names, arguments)


def _tokenizer_files(name: str, revision: str | None) -> _ModelFiles:
    files = _locate(name, revision)
    if files.has_tokenizer:
        return files
    if files.is_adapter:
        base, base_revision = _base_of(name, files)
        with _about_base_of(name):
            return _tokenizer_files(base, base_revision)
    raise UsageError(f"{name}: no tokenizer beside the model; looked for {', '.join(sorted(_TOKENIZER_FILES))}")


def _folder_in_run(path: Path) -> Path:
    """`model/` of a run folder, else the folder itself."""
    if not (path / "config.yaml").is_file() or (path / _CONFIG).is_file():
        return path
    if (path / "model").is_dir():
        return path / "model"
    checkpoints = ", ".join(sorted(entry.name for entry in path.glob("checkpoint-*"))) or "none yet"
    raise UsageError(f"{path}: a run folder without model/: the run has not finished (its checkpoints: {checkpoints})")


def _file_names(folder: Path) -> frozenset[str]:
    return frozenset(entry.name for entry in folder.iterdir())


def _is_possible_hub_name(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name)


@lru_cache(maxsize=32)
def _names_on_hub(name: str, revision: str | None) -> frozenset[str] | None:
    """Names of a Hub model's files, or None when the Hub is out of reach. One request, remembered for the process."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(name, revision=revision, timeout=_HUB_TIMEOUT_SECONDS)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UsageError(_explain(name, error)) from error
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


def _base_of(name: str, files: _ModelFiles) -> tuple[str, str | None]:
    """Name and revision of an adapter's base model."""
    from huggingface_hub import hf_hub_download

    with _one_line_errors(name, _ADAPTER_CONFIG):
        path = Path(files.location) / _ADAPTER_CONFIG
        if not path.is_file():
            path = Path(hf_hub_download(files.location, _ADAPTER_CONFIG, **files.arguments))
        adapter = json.loads(path.read_text(encoding="utf-8"))
    base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
    if not base:
        raise UsageError(f"{name}: {_ADAPTER_CONFIG} does not name the base model (base_model_name_or_path)")
    return base, adapter.get("revision")


# --- checks --------------------------------------------------------------------------------------------------------


def _check_files(location: str, names: frozenset[str]) -> None:
    if _CONFIG not in names and _ADAPTER_CONFIG not in names:
        raise UsageError(f"{location}: not a model: neither {_CONFIG} nor {_ADAPTER_CONFIG} is there")
    wanted = _ADAPTER_WEIGHTS if _ADAPTER_CONFIG in names else _WEIGHTS
    if not names.isdisjoint(wanted):
        return
    pickles = sorted(name for name in names if name.endswith(_PICKLE_SUFFIXES) and name != "training_args.bin")
    if pickles:
        raise UsageError(
            f"{location}: only safetensors are read and the weights are a pickle ({pickles[0]}); convert them with "
            f"transformers: AutoModelForCausalLM.from_pretrained({location!r}).save_pretrained('new-folder')"
        )
    raise UsageError(f"{location}: no weights; looked for {' or '.join(wanted)}")


def _check_shards(folder: Path) -> None:
    index = folder / _WEIGHTS[1]
    if (folder / _WEIGHTS[0]).is_file() or not index.is_file():
        return
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{index}: not a readable list of shards ({error})") from error
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        raise UsageError(f"{folder}: {len(missing)} of {len(shards)} weight files are missing, first {missing[0]}")


def _check_causal(name: str, config: PretrainedConfig) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.is_encoder_decoder:
        raise UsageError(f"{name}: {config.model_type} is an encoder-decoder; only decoder-only language models work")
    if "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        return
    head = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if head is None:
        raise UsageError(f"{name}: {config.model_type} is not a causal language model")
    architectures = config.architectures or [head]
    if not any(found == head or found.endswith(_CAUSAL_ENDINGS) for found in architectures):
        raise UsageError(
            f"{name}: the weights are of {architectures[0]}, not of a causal language model such as {head}"
        )


def _check_complete(name: str, report: dict[str, Any]) -> None:
    missing, mismatched = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    if missing:
        raise UsageError(f"{name}: {len(missing)} weights are not in the files, first {missing[0]}")
    if mismatched:
        key, stored, expected = mismatched[0]
        raise UsageError(
            f"{name}: {len(mismatched)} weights have another shape than config.json says, first {key}: "
            f"{tuple(stored)} found, {tuple(expected)} expected"
        )


# --- errors and noise ----------------------------------------------------------------------------------------------


@contextmanager
def _one_line_errors(name: str, what: str) -> Iterator[None]:
    """Turn what Transformers, PEFT and the Hub client raise for unusable files or options into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UsageError(_explain(name, error, what)) from error
    except Exception as error:
        # `tokenizers` raises bare `Exception` for a damaged tokenizer.json; any subclass is not for us.
        if type(error) is not Exception:
            raise
        raise UsageError(_explain(name, error, what)) from error


@contextmanager
def _about_base_of(name: str) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{name}: its base model: {error}") from error


def _explain(name: str, error: BaseException, what: str = "model") -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    causes = list(_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"{name}: a gated model: accept its terms on its Hub page, then log in with `hf auth login`"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return (
            f"{name}: no such folder, and no such model on the Hugging Face Hub (a private one needs "
            f"`hf auth login`); {OFFLINE_MODEL} needs neither"
        )
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"{name}: the Hugging Face Hub has no such revision of this model"
    if "trust_remote_code" in str(error):
        return f"{name}: it needs code of its own to be run; set trust_remote_code to true if you trust its author"
    reason = shorten(str(error), width=300) or type(error).__name__
    return f"{name}: the {what} cannot be loaded: {reason}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def _quiet_transformers(files: _ModelFiles) -> Iterator[None]:
    """Silence Transformers' bars and remarks on local files; a download from the Hub keeps its progress bar."""
    from transformers.utils import logging

    if not Path(files.location).is_dir():
        yield
        return
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
