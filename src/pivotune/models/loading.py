"""Find, check and load models and tokenizers by name.

A name is one of: `bundled:smollm2-135m-instruct`; a folder in Hugging Face form; a PEFT adapter folder
(`adapter_config.json`), loaded as its base model with the adapter on top; a run folder, for its `model/`; a Hugging Face
Hub name. Only safetensors are read. All checks that need no weights come first, and every mistake is one line.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pivotune.errors import UsageError
from pivotune.models.locating import (
    ModelFiles,
    about_base_of,
    base_of,
    check_index,
    locate,
    one_line_errors,
    stores_another_head,
    tokenizer_files,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16")
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")


def read_config(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None, translates: bool = False
) -> PretrainedConfig:
    """Read the configuration of a causal language model; of an adapter, that of its base model. Loads no weights.

    Args:
        translates: accept an encoder-decoder too.

    Raises:
        UsageError: as `locate`; a gated repository; another kind of model than asked for.
    """
    files = locate(name, revision)  # before torch is imported
    from transformers import AutoConfig

    if files.is_adapter:
        base, base_revision = base_of(name, files)
        with about_base_of(name):
            options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "translates": translates}
            return read_config(base, revision=base_revision, **options)
    with one_line_errors(name, "configuration"):
        config = AutoConfig.from_pretrained(files.location, trust_remote_code=trust_remote_code, **files.arguments)
    _check_kind(name, config, translates)
    if not trust_remote_code:
        _check_no_kernel(name, config)
    # Encoder and decoder of a translation model may have embeddings of their own.
    if not config.is_encoder_decoder and getattr(config, "tie_word_embeddings", False):
        text = config.get_text_config()
        with one_line_errors(name, "model"):
            # Transformers loads both then, and warns; a saved copy would say that they are one.
            if stores_another_head(Path(files.location), (text.vocab_size, text.hidden_size)):
                config.tie_word_embeddings = text.tie_word_embeddings = False
    return config


def check_model(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> None:
    """Raise the errors of `read_config`, and one for a model without a tokenizer; no weight is read."""
    read_config(name, trust_remote_code=trust_remote_code, revision=revision)
    tokenizer_files(name, revision)


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None, translates: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model (of an adapter without one: of its base), padding on the right.

    A tokenizer without a padding token pads with its end-of-text token. So padding cannot be recognized by its id: masks
    and labels must be built from lengths, as the collator does, or the model would not learn to stop.

    Raises:
        UsageError: as `check_model`; no end-of-text token; unreadable tokenizer files; as `check_vocabulary`.
    """
    files = tokenizer_files(name, revision)
    from transformers import AutoTokenizer

    with one_line_errors(name, "tokenizer"), _quiet_transformers(files):
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
    if not locate(name, revision).is_adapter:
        # An adapter may bring an embedding of its own.
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "translates": translates}
        check_vocabulary(name, tokenizer, read_config(name, revision=revision, **options))
    tokenizer.padding_side = "right"
    return tokenizer


def check_vocabulary(name: str, tokenizer: Any, config: PretrainedConfig) -> None:
    """Refuse a tokenizer with tokens that the model has no embedding of.

    A special token that no text becomes (Gemma 3's place of an image) may lack one.

    Raises:
        UsageError: names such a token and both sizes.
    """
    rows = config.get_text_config().vocab_size
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special -= {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token}
    beyond = [token for token, place in tokenizer.get_vocab().items() if place >= rows and token not in special]
    if beyond:
        raise UsageError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, {beyond[0]!r} among them, and the model's embedding "
            f"{rows} rows; use the model's own tokenizer, or resize its embedding"
        )


def load_model(
    name: str,
    *,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    attn_implementation: str | None = None,
    quantize: Literal["4bit"] | None = None,
    translates: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode; an adapter as a frozen `PeftModel` on its base.

    Args:
        name: any form that the module docstring lists.
        dtype: of the weights; `auto` keeps the stored one.
        revision: branch, tag or commit on the Hub; ignored for folders.
        attn_implementation: Transformers' option of that name (`sdpa`, `eager`, `flash_attention_2`...).
        quantize: `4bit` loads NF4 weights (QLoRA, Dettmers et al. 2023) through bitsandbytes, on CUDA or a CPU.
        translates: accept an encoder-decoder too.

    Raises:
        UsageError: as `check_model`; unknown option values; weights that are damaged, missing or of another shape.
    """
    import torch

    if dtype not in DTYPES:
        raise UsageError(f"dtype: {dtype!r} found; allowed: {', '.join(DTYPES)}")
    torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "dtype": torch_dtype}
    if quantize not in (None, "4bit"):
        raise UsageError(f"quantize: {quantize!r} found; allowed: 4bit, or leave it out")
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantize is not None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UsageError("quantize: 4bit needs the package bitsandbytes: pip install bitsandbytes")
        from transformers import BitsAndBytesConfig

        nf4 = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    return _load(name, revision, options, translates)


def load_on_device(name: str, *, gpu_dtype: Literal["auto", "bfloat16"] = "auto", **options: Any) -> Any:
    """Load a model onto the GPU, with weights of `gpu_dtype`, or the CPU; `options` and errors as in `load_model`."""
    import torch

    if torch.cuda.is_available():
        model: Any = load_model(name, dtype=gpu_dtype, **options)
        return model.to("cuda")
    model = load_model(name, **options)
    return model.float() if model.dtype == torch.float16 else model  # arithmetic in float16 is slow on a CPU


def _load(name: str, revision: str | None, options: dict[str, Any], translates: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    files = locate(name, revision)
    if files.is_adapter:
        from peft import PeftModel

        base, base_revision = base_of(name, files)
        with about_base_of(name):
            model = _load(base, base_revision, options, translates)
        with one_line_errors(name, "adapter"):
            return PeftModel.from_pretrained(model, files.location, is_trainable=False, **files.arguments)
    remote = options["trust_remote_code"]
    config = read_config(name, trust_remote_code=remote, revision=revision, translates=translates)
    check_index(files, getattr(config, "transformers_weights", None))
    # Mismatched sizes are in the report and refused below, instead of a RuntimeError of many lines.
    options = {**options, **files.arguments, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if Path(files.location).is_dir():
        options["config"] = config  # of which `read_config` may have corrected the tied weights
    with one_line_errors(name, "model"), _quiet_transformers(files):
        auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        loaded: Any = auto.from_pretrained(files.location, use_safetensors=True, **options)
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UsageError(f"{name}: {len(missing)} weights are not in the files, first {missing[0]}")
    if mismatched := sorted(report["mismatched_keys"]):
        key, stored, expected = mismatched[0]
        raise UsageError(
            f"{name}: {len(mismatched)} weights have another shape than config.json says, first {key}: "
            f"{tuple(stored)} found, {tuple(expected)} expected"
        )
    return model


def _check_kind(name: str, config: PretrainedConfig, translates: bool) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if translates and config.is_encoder_decoder:
        return
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


def _check_no_kernel(name: str, config: PretrainedConfig) -> None:
    """Refuse a configuration that names an attention kernel on the Hub: Transformers would fetch and run it."""
    for part in (config, config.get_text_config()):
        for key in ("_attn_implementation", "_experts_implementation"):
            wanted = getattr(part, key, None)
            if isinstance(wanted, str) and "/" in wanted:
                raise UsageError(
                    f"{name}: its configuration asks for code from the Hub ({key.strip('_')}: {wanted}); set "
                    "trust_remote_code to true if you trust its author"
                )


@contextmanager
def _quiet_transformers(files: ModelFiles) -> Iterator[None]:
    """Silence Transformers' progress bars and warnings for local files; a download keeps its progress bar."""
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
