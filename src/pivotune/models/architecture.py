"""The only file that knows the module names of an architecture.

A new family is one entry in `ARCHITECTURES`, or a call of `register_architecture`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pivotune.errors import UsageError
from pivotune.models.sharding import compute_device


@dataclass(frozen=True, kw_only=True)
class ArchitectureSpec:
    """Module paths of a model class, and functions of its configuration.

    Attributes:
        decoder: path from the causal LM to the module that owns the blocks.
        blocks: name of the `nn.ModuleList` of decoder blocks in the decoder.
        final_norm: name of the norm that the decoder applies after the last block.
        lm_head: path from the causal LM to the output projection.
        softcap: reads the cap c of `c * tanh(logits / c)` from the text configuration; None for no cap.
        logit_scale: reads the factor by which the model multiplies `lm_head(h)`; 1.0 for none.
        shared_prefix: True if a packed batch gives the same states (test it with
            `pivotune.forward.passes.check_shared_passes`): causal attention through Transformers' attention interface,
            positions only from `position_ids`, and no other operation between tokens.
    """

    decoder: str = "model"
    blocks: str = "layers"
    final_norm: str = "norm"
    lm_head: str = "lm_head"
    softcap: Callable[[Any], float | None] = lambda config: None
    logit_scale: Callable[[Any], float] = lambda config: 1.0
    shared_prefix: bool = False


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The parts of one loaded model. Layer k means "after k decoder blocks"; see `pivotune.models.taps`."""

    model_type: str
    decoder: nn.Module
    blocks_name: str
    final_norm: nn.Module
    lm_head: nn.Module
    softcap: float | None
    logit_scale: float
    shared_prefix: bool = False

    @property
    def blocks(self) -> nn.ModuleList:
        return getattr(self.decoder, self.blocks_name)

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def head_weight(self) -> Tensor:
        """The LM head's matrix, (vocabulary, width); with tied embeddings the input embedding itself."""
        return cast(Tensor, self.lm_head.weight)

    @property
    def device(self) -> torch.device:
        """The device that the model computes on, even if its shards are kept on the CPU (FSDP2's off-loading)."""
        return compute_device(self.head_weight)

    @property
    def vocab_size(self) -> int:
        return self.head_weight.shape[0]

    def transform_logits(self, projected: Tensor) -> Tensor:
        """Apply the model's logit scale, then its soft-cap, to `lm_head(h)`. Any shape; same shape back."""
        if self.logit_scale != 1.0:
            projected = projected * self.logit_scale
        if self.softcap is not None:
            projected = self.softcap * torch.tanh(projected / self.softcap)
        return projected


_LLAMA_LIKE = ArchitectureSpec(shared_prefix=True)
_GEMMA = replace(_LLAMA_LIKE, softcap=lambda config: getattr(config, "final_logit_softcapping", None))

# `model_type` of the configuration -> spec. The tests run every invariant on a tiny model of each entry.
ARCHITECTURES: dict[str, ArchitectureSpec] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "olmo3", "smollm3", "gemma"), _LLAMA_LIKE),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma3": replace(_LLAMA_LIKE, decoder="model.language_model"),
    "gpt_neox": replace(_LLAMA_LIKE, decoder="gpt_neox", final_norm="final_layer_norm"),
    "gpt2": replace(_LLAMA_LIKE, decoder="transformer", blocks="h", final_norm="ln_f"),
    "cohere": replace(_LLAMA_LIKE, logit_scale=lambda config: config.logit_scale),
    "granite": replace(_LLAMA_LIKE, logit_scale=lambda config: 1.0 / config.logits_scaling),
}


def register_architecture(model_type: str, spec: ArchitectureSpec) -> None:
    """Register a new family, `model_type` as in `config.json`; check it with `pivotune.lenses.logit.check_lens(model)`."""
    ARCHITECTURES[model_type] = spec


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the causal LM inside DDP, `torch.compile` and PEFT wrappers; adapters in its blocks stay active."""
    while True:
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if isinstance(inner, nn.Module):
            model = inner
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = cast(Any, model).get_base_model()
        else:
            return model


def find_architecture(model: nn.Module) -> Architecture:
    """Find the parts of a Hugging Face causal LM, wrapped or not.

    Raises:
        UsageError: the family is unknown (the message names the function to call) or the model lacks a named part.
    """
    model = unwrap_model(model)
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    check_architecture(model_type)
    spec = ARCHITECTURES[model_type]
    text_config = config.get_text_config()

    def find(module: nn.Module, path: str, part: str) -> nn.Module:
        try:
            return module.get_submodule(path)
        except AttributeError as error:
            raise UsageError(
                f"model type {model_type!r}: no module {path!r} in {type(module).__name__} for its {part}; register the "
                "right path with pivotune.models.architecture.register_architecture"
            ) from error

    decoder = find(model, spec.decoder, "decoder")
    find(decoder, spec.blocks, "blocks")
    return Architecture(
        model_type=model_type,
        decoder=decoder,
        blocks_name=spec.blocks,
        final_norm=find(decoder, spec.final_norm, "final_norm"),
        lm_head=find(model, spec.lm_head, "lm_head"),
        softcap=spec.softcap(text_config),
        logit_scale=float(spec.logit_scale(text_config)),
        shared_prefix=spec.shared_prefix,
    )


def check_architecture(model_type: str) -> None:
    """Refuse an unsupported `model_type` before any weight is loaded."""
    if model_type in ARCHITECTURES:
        return
    nearest = difflib.get_close_matches(model_type, ARCHITECTURES, n=1)
    hint = f" (nearest known: {nearest[0]})" if nearest else ""
    raise UsageError(
        f"model type {model_type!r} is not supported{hint}; supported: {', '.join(sorted(ARCHITECTURES))}. To add it, call "
        "pivotune.models.architecture.register_architecture(model_type, ArchitectureSpec(decoder=, blocks=, final_norm=, "
        "lm_head=, softcap=, logit_scale=))"
    )
