"""Tokens that are computed with detached weights (`logits.gradient: prompt`), in blocks that other tokens train.

The English tokens of a branch are training examples of writing English in the first layers, but only the prompt's states
are used when the model answers. With their weights detached, their gradient reaches the weights through the keys and
values of the prompt alone. A linear layer then also saves its weight-gradient product of these tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pivotune.models.sharding import class_of, forward_set, has_replaced_forward

# The tokens that train the weights: the first n of a packed batch (1, N, ...), or a mask (R, U) of a padded one.
Trained = int | Tensor
Arguments = tuple[tuple, dict[str, Any]]


@contextmanager
def weights_detached(block: nn.Module, trained: Trained, tokens: int) -> Iterator[None]:
    """Inside the context a block's parameters, adapters included, get no gradient from tokens that are not `trained`.

    Every module that owns trained parameters must take the tokens as the second dimension of its first argument, or as
    the third behind the heads, as linear layers and norms do.

    Args:
        tokens: number of tokens that the block reads, N or U.
    """
    with ExitStack() as stack:
        for module in block.modules():
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                stack.enter_context(_forward_replaced(module, trained, tokens))
        yield


def detach_tokens(states: Tensor, trained: Trained) -> Tensor:
    """Return states (1, N, ...) or (R, U, ...) that pass gradient on to `trained` tokens only."""
    if isinstance(trained, int):
        return torch.cat([states[:, :trained], states[:, trained:].detach()], dim=1)
    return torch.where(trained[..., None], states, states.detach())


def input_detached(passing: Trained, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Arguments:
    """Return a block's arguments with hidden states that pass gradient on to the `passing` tokens only."""
    if args:
        return (detach_tokens(args[0], passing), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": detach_tokens(kwargs["hidden_states"], passing)}


@contextmanager
def tokens_detached(block: nn.Module, trained: Tensor, passing: Tensor | None = None) -> Iterator[None]:
    """Inside the context `weights_detached` applies to a block of a padded pass, in its checkpoints too.

    Args:
        trained: (R, U) bool, the tokens that train the block.
        passing: (R, U) bool, the tokens through which gradient leaves the block downwards; None for all.
    """
    context = partial(weights_detached, block, trained, trained.shape[1])
    enter = None if passing is None else partial(input_detached, passing)
    with ExitStack() as stack:
        if enter is not None:
            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.enter_context(kept_in_checkpoints(block, context, enter))
        stack.enter_context(context())
        yield


def _forward_replaced(module: nn.Module, trained: Trained, tokens: int) -> AbstractContextManager[None]:
    if isinstance(vars(module).get("forward"), _PartlyDetached):
        # A checkpoint keeps the context and enters it inside the first one too.
        return nullcontext()
    linear = class_of(module) is nn.Linear and not has_replaced_forward(module)
    if linear and isinstance(trained, int):
        return forward_set(module, _PartlyDetached(_linear, module, trained))
    return forward_set(module, _PartlyDetached(_by_parts, module, module.forward, trained, tokens))


class _PartlyDetached(partial):
    """A forward set by `weights_detached`, recognized by its class."""


def _by_parts(
    module: nn.Module, forward: Callable[..., Tensor], trained: Trained, tokens: int, states: Tensor, *args: Any
) -> Tensor:
    """Call the module's own forward with its weights for trained tokens, and with detached ones for the others."""
    dim = _token_dim(states, tokens)
    if isinstance(trained, Tensor):
        with _parameters_detached(module):
            detached = forward(states, *args)
        mask = trained[:, None] if dim == 2 else trained
        return torch.where(mask[(...,) + (None,) * (states.ndim - mask.ndim)], forward(states, *args), detached)
    first, others = states.split([trained, tokens - trained], dim)
    with _parameters_detached(module):
        detached = forward(others, *args)
    return torch.cat([forward(first, *args), detached], dim)


def _token_dim(states: Tensor, tokens: int) -> int:
    """Return the dimension of the tokens: 1, or 2 where norms of queries and keys read (rows, heads, tokens, width)."""
    dims = [dim for dim in (1, 2)[: states.ndim - 2] if states.shape[dim] == tokens]
    if not dims:
        raise ValueError(
            f"logits.gradient: prompt: a module reads {tuple(states.shape)}, which holds no {tokens} tokens"
        )
    # With as many heads as tokens: a token's heads lie together in memory.
    return max(dims, key=states.stride)


def _linear(module: nn.Linear, trained: int, states: Tensor) -> Tensor:
    weight: Tensor = module.weight
    bias: Tensor | None = module.bias
    if torch.is_autocast_enabled(states.device.type):
        # As autocast does it, but outside the function, whose backward runs without autocast.
        dtype = torch.get_autocast_dtype(states.device.type)
        states, weight = states.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return _PartlyTrainedLinear.apply(states, weight, bias, trained)


class _PartlyTrainedLinear(torch.autograd.Function):
    """`states` W^T + b, where W and b get the gradient of the first `trained` tokens (1, N, width)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, trained: int) -> Tensor:
        ctx.save_for_backward(states[:, :trained], weight)
        ctx.trained = trained
        return F.linear(states, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        states, weight = ctx.saved_tensors
        own = gradient[:, : ctx.trained].flatten(0, -2)
        return (
            gradient @ weight if ctx.needs_input_grad[0] else None,
            own.T @ states.flatten(0, -2) if ctx.needs_input_grad[1] else None,
            own.sum(0) if ctx.needs_input_grad[2] else None,
            None,
        )


@contextmanager
def _parameters_detached(module: nn.Module) -> Iterator[None]:
    own = dict(module._parameters)
    for name, parameter in own.items():
        module._parameters[name] = None if parameter is None else parameter.detach()  # type: ignore[assignment]
    try:
        yield
    finally:
        module._parameters.update(own)


# --- activation checkpoints: they run a block again in the backward pass, after these contexts have ended ----------


@contextmanager
def kept_in_checkpoints(
    block: nn.Module,
    context: Callable[[], AbstractContextManager[Any]],
    enter: Callable[[nn.Module, tuple, dict[str, Any]], Arguments] | None = None,
) -> Iterator[None]:
    """Make the function that a checkpoint keeps enter `context`; under Transformers' own, `enter` changes its inputs.

    Inputs of torch's `checkpoint_wrapper` are changed already by hooks, which do not rerun.
    """
    name, owner = "checkpoint_fn", _checkpoint_wrapper(block)
    own = owner is None
    if own and not (getattr(block, "gradient_checkpointing", False) and block.training):
        yield
        return
    if own:
        name = "_gradient_checkpointing_func"
        # Set on the module inside: attributes set on an FSDP wrapper do not reach it.
        owner = next((module for module in block.modules() if name in vars(module)), block)
    checkpoint = getattr(owner, name)

    def keeping(function: Any, *args: Any, **kwargs: Any) -> Any:
        if own and enter is not None:
            args, keywords = enter(owner, args, function.keywords)
            function = partial(function.func, *function.args, **keywords)

        def inside(*args: Any, **kwargs: Any) -> Any:
            with context():
                return function(*args, **kwargs)

        return checkpoint(inside, *args, **kwargs)

    setattr(owner, name, keeping)
    try:
        yield
    finally:
        setattr(owner, name, checkpoint)


def _checkpoint_wrapper(block: nn.Module) -> Any:
    """Return torch's `checkpoint_wrapper` around a block (FSDP's own activation checkpointing adds it), or None."""
    while hasattr(block, "_checkpoint_wrapped_module"):
        # Not `hasattr`: torch's wrappers pass attributes of the wrapped module on.
        if "checkpoint_fn" in vars(block):
            return block
        block = vars(block)["_modules"]["_checkpoint_wrapped_module"]
    return None
