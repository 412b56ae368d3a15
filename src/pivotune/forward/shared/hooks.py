"""Run a Hugging Face decoder over a packed batch, through its public extension points only.

Inside `packed` the model reads a `Packing` in one ordinary forward: a registered attention function keeps the sequences
apart, and forward pre-hooks on the blocks cut off the branches that have reached their layer. Nothing of it stays in
the model afterwards; what activation checkpoints compute again in the backward pass carries it along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pivotune.forward.shared.attention import packed_attention
from pivotune.forward.shared.packing import Packing
from pivotune.models.architecture import Architecture, find_architecture, unwrap_model

ATTENTION = "pivotune_packed"
_packing: ContextVar[Packing | None] = ContextVar("packing", default=None)
# What a block reads that is as long as its hidden states.
_PER_TOKEN = ("hidden_states", "position_ids", "position_embeddings")


def why_not_packed(model: nn.Module) -> str | None:
    """Why this model cannot read packed batches, in words for a message; None where it can."""
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
    """How many positions a packed batch may have; None for any number.

    Some rotary embeddings (`dynamic`, `longrope`) change for all tokens of a forward when its longest sequence passes the
    length that the model was first trained on. Branches in the same forward could then change it for the main rows.
    """
    lengths = []
    for config in _configs(unwrap_model(model)):
        rope = getattr(config, "rope_parameters", None) or {}
        nested = [value for value in rope.values() if isinstance(value, dict)] or [rope]
        if any(parameters.get("rope_type") in ("dynamic", "longrope") for parameters in nested):
            lengths += [parameters.get("original_max_position_embeddings") for parameters in nested]
            lengths.append(getattr(config, "original_max_position_embeddings", None))
            lengths.append(getattr(config, "max_position_embeddings", None))
    return min((length for length in lengths if length), default=None)


@contextmanager
def packed(model: nn.Module, architecture: Architecture, packing: Packing) -> Iterator[None]:
    """Inside the context the model's forward reads `packing.input_ids` and `packing.position_ids`, both (1, N)."""
    configs = _configs(unwrap_model(model))
    with ExitStack() as stack:
        stack.enter_context(_attention_installed(configs, packing))
        for index, block in enumerate(architecture.blocks):
            count = packing.tokens_left(index)
            if count < packing.num_tokens:
                stack.callback(block.register_forward_pre_hook(partial(_narrow, count), with_kwargs=True).remove)
            if (wrapper := _checkpoint_wrapper(block)) is not None:
                stack.enter_context(_wrapper_carries(wrapper, configs, packing))
            elif getattr(block, "gradient_checkpointing", False) and block.training:
                stack.enter_context(_checkpoint_carries(_checkpointed(block), configs, packing, count))
        lengthen = partial(_lengthen, packing.num_tokens)
        stack.callback(architecture.final_norm.register_forward_hook(lengthen).remove)
        yield


@contextmanager
def _attention_installed(configs: Sequence[Any], packing: Packing) -> Iterator[None]:
    _register_attention()
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


@contextmanager
def _checkpoint_carries(block: nn.Module, configs: Sequence[Any], packing: Packing, count: int) -> Iterator[None]:
    """Activation checkpoints run a block again in the backward pass, when this context is long over.

    So the function that they keep brings the attention with it, and reads what is narrow already.
    """
    owner: Any = block
    checkpoint = owner._gradient_checkpointing_func

    def carrying(function: partial, *args: Any) -> Any:
        args, keywords = _narrow(count, block, args, function.keywords)
        run = partial(function.func, *function.args, **keywords)
        return checkpoint(_with_attention(run, configs, packing), *args)

    owner._gradient_checkpointing_func = carrying
    try:
        yield
    finally:
        owner._gradient_checkpointing_func = checkpoint


def _checkpoint_wrapper(block: nn.Module) -> Any:
    """torch's `checkpoint_wrapper` around a block, which FSDP's own activation checkpointing puts there; or None."""
    while hasattr(block, "_checkpoint_wrapped_module"):
        # Not `hasattr`: torch's wrappers answer for what they wrap.
        if "checkpoint_fn" in vars(block):
            return block
        block = vars(block)["_modules"]["_checkpoint_wrapped_module"]
    return None


@contextmanager
def _wrapper_carries(owner: Any, configs: Sequence[Any], packing: Packing) -> Iterator[None]:
    """As `_checkpoint_carries`; a wrapper's hooks are outside of what is run again, which is narrow already."""
    checkpoint = owner.checkpoint_fn

    def carrying(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(_with_attention(function, configs, packing), *args, **kwargs)

    owner.checkpoint_fn = carrying
    try:
        yield
    finally:
        owner.checkpoint_fn = checkpoint


def _checkpointed(block: nn.Module) -> nn.Module:
    """The block itself where it is wrapped: what is set on an FSDP wrapper does not reach the module inside."""
    return next((module for module in block.modules() if "_gradient_checkpointing_func" in vars(module)), block)


def _with_attention(function: Callable[..., Any], configs: Sequence[Any], packing: Packing) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _attention_installed(configs, packing):
            return function(*args, **kwargs)

    return run


def _narrow(count: int, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A block's arguments with the first `count` tokens only."""
    args = tuple(_first(value, count) if index == 0 else value for index, value in enumerate(args))
    return args, {name: _first(value, count) if name in _PER_TOKEN else value for name, value in kwargs.items()}


def _lengthen(length: int, norm: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Zeros where branches have left: a decoder may give its output the shape of its input (GPT-2)."""
    missing = length - output.shape[1]
    return F.pad(output, (0, 0, 0, missing)) if missing else output


def _first(value: Any, count: int) -> Any:
    if isinstance(value, Tensor):
        return value[:, :count]
    return tuple(_first(item, count) for item in value) if isinstance(value, (tuple, list)) else value


@cache
def _register_attention() -> None:
    from transformers import AttentionInterface

    # No mask function beside it: Transformers then makes no mask.
    AttentionInterface.register(ATTENTION, _attention)


# Not traced by torch.compile: what it reads changes with every batch, and would be compiled anew each time.
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
    return packed_attention(
        packing, query, key, value, scaling=scaling, dropout=dropout, window=sliding_window, softcap=softcap
    ), None


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration that some module reads its attention from, each once; the model's own first."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in configs if hasattr(config, "_attn_implementation")}.values())
