"""Run a Hugging Face decoder over a packed batch, through its public extension points only.

A registered attention function keeps the sequences apart, and forward pre-hooks on the blocks cut off the branches that
have reached their layer. Activation checkpoints keep the packing for their second run in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pivotune.forward.detached import input_detached, kept_in_checkpoints, weights_detached
from pivotune.forward.shared.attention import packed_attention
from pivotune.forward.shared.packing import Packing
from pivotune.models.architecture import Architecture, find_architecture, unwrap_model

ATTENTION = "pivotune_packed"
_packing: ContextVar[Packing | None] = ContextVar("packing", default=None)
# Arguments of a block that are as long as its hidden states.
_PER_TOKEN = ("hidden_states", "position_ids", "position_embeddings")


def packing_unsupported_reason(model: nn.Module) -> str | None:
    """Return the reason why this model cannot read packed batches, for a message; None if it can."""
    model = unwrap_model(model)
    architecture = find_architecture(model)
    if not architecture.shared_prefix:
        return (
            f"model type {architecture.model_type!r} is registered without shared_prefix=True (check it with "
            "pivotune.forward.passes.check_shared_passes)"
        )
    if len(set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))) > 1:
        return "the model is spread over several devices"
    if any(getattr(config, "use_bidirectional_attention", False) for config in _configs(architecture.decoder)):
        return "its attention is not causal"
    return None


def longest_packed(model: nn.Module) -> int | None:
    """Return how many positions a packed batch may have; None for any number.

    Some rotary embeddings (`dynamic`, `longrope`) change for all tokens of a forward if its longest sequence passes the
    length that the model was first trained on. Branches in the same forward could then change it for the main rows.
    """
    lengths = []
    for config in _configs(unwrap_model(model)):
        rope = getattr(config, "rope_parameters", None) or {}
        nested = [value for value in rope.values() if isinstance(value, dict)] or [rope]
        if any(parameters.get("rope_type") in ("dynamic", "longrope") for parameters in nested):
            lengths += [parameters.get("original_max_position_embeddings") for parameters in nested]
            names = ("original_max_position_embeddings", "max_position_embeddings")
            lengths += [getattr(config, name, None) for name in names]
    return min((length for length in lengths if length), default=None)


@contextmanager
def packed(model: nn.Module, architecture: Architecture, packing: Packing) -> Iterator[None]:
    """Inside the context the model's forward reads `packing.input_ids` and `packing.position_ids`, both (1, N)."""
    configs = _configs(unwrap_model(model))
    with ExitStack() as stack:
        stack.enter_context(_attention_installed(configs, packing))
        for index, block in enumerate(architecture.blocks):
            enter = partial(_enter, packing, index)
            if packing.tokens_left(index) < packing.num_tokens or packing.trained is not None:
                stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            inside = partial(_inside, block, configs, packing, index)
            stack.enter_context(kept_in_checkpoints(block, inside, enter))
            stack.enter_context(_branches_detached(block, packing, index))
        lengthen = partial(_lengthen, packing.num_tokens)
        stack.callback(architecture.final_norm.register_forward_hook(lengthen).remove)
        yield


def _configs(model: nn.Module) -> list[Any]:
    """Return every configuration from which some module reads its attention, each once; the model's own first."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in configs if hasattr(config, "_attn_implementation")}.values())


# --- attention -----------------------------------------------------------------------------------------------------


@contextmanager
def _attention_installed(configs: Sequence[Any], packing: Packing) -> Iterator[None]:
    from transformers import AttentionInterface

    # Registered without a mask function, so that Transformers makes no mask.
    AttentionInterface.register(ATTENTION, _attention)
    before = [config._attn_implementation for config in configs]
    token = _packing.set(packing)
    try:
        for config in configs:
            config._attn_implementation = ATTENTION
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
        _packing.reset(token)


# Not traced by torch.compile: the packing changes with every batch, and each would be compiled anew.
@torch.compiler.disable
def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    packing = _packing.get()
    assert packing is not None, "the packed attention runs inside `packed` only"
    options: Any = {"scaling": scaling, "dropout": dropout, "window": sliding_window, "softcap": softcap}
    return packed_attention(packing, query, key, value, **options), None


@contextmanager
def _inside(block: nn.Module, configs: Sequence[Any], packing: Packing, index: int) -> Iterator[None]:
    """The contexts in which block number `index` runs again for an activation checkpoint."""
    with _attention_installed(configs, packing), _branches_detached(block, packing, index):
        yield


def _branches_detached(block: nn.Module, packing: Packing, index: int) -> AbstractContextManager[None]:
    if packing.trained is None or packing.tokens_left(index) <= packing.trained:
        return nullcontext()
    return weights_detached(block, packing.trained, packing.tokens_left(index))


# --- branches that leave -------------------------------------------------------------------------------------------


def _enter(
    packing: Packing, index: int, block: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments of block number `index` without the branches that have left.

    The first block reads embeddings; with detached weights those of branch tokens are not trained either.
    """
    count = packing.tokens_left(index)
    args = tuple(_first(value, count) if place == 0 else value for place, value in enumerate(args))
    kwargs = {name: _first(value, count) if name in _PER_TOKEN else value for name, value in kwargs.items()}
    if index == 0 and packing.trained is not None:
        return input_detached(packing.trained, block, args, kwargs)
    return args, kwargs


def _first(value: Any, count: int) -> Any:
    if isinstance(value, Tensor):
        return value[:, :count]
    return tuple(_first(item, count) for item in value) if isinstance(value, (tuple, list)) else value


def _lengthen(length: int, norm: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Fill up with zeros in place of the branches that left: a decoder may give its output its input's shape (GPT-2)."""
    missing = length - output.shape[1]
    return F.pad(output, (0, 0, 0, missing)) if missing else output
