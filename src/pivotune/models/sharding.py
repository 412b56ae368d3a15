"""The place of a model's weights: devices, and shards that several processes share out among them.

The losses read the head's and the norm's weights outside the model's forward.

- FSDP2 keeps every parameter as a shard and gathers a module's parameters around its forward. Accelerate keeps the head,
  the embedding that it may be tied to and the final norm (not below adapters) gathered from the forward to the backward
  pass. So both are plain tensors for the losses.
- ZeRO-3 replaces parameters by empty tensors and gathers a module's own around its call. Code that reads them runs in
  place of the module's forward (`in_place_of_forward`), one call for each loss, the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

_Result = TypeVar("_Result")
_assumed_kind: ContextVar[str | None] = ContextVar("assumed_device_kind", default=None)


def device_kind(tensor: Tensor) -> str:
    """Return the device type (`cpu`, `cuda`...) by which kernels and chunk sizes are chosen."""
    return _assumed_kind.get() or tensor.device.type


@contextmanager
def assumed_device_kind(kind: str) -> Iterator[None]:
    """Inside the context `device_kind` returns `kind`: for an estimate made on another machine."""
    token = _assumed_kind.set(kind)
    try:
        yield
    finally:
        _assumed_kind.reset(token)


@contextmanager
def placed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Move the model to `device` inside the context; one on an accelerator already (quantized, say) stays there."""
    own = next(model.parameters()).device
    if own.type != "cpu" or device.type == "cpu":
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(own)


def compute_device(parameter: Tensor) -> torch.device:
    """Return the device that a parameter is computed with: for a shard, that of its mesh, even if it is off-loaded."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None or mesh.device_type == "cpu":
        return parameter.device
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def in_lockstep() -> bool:
    """Return True in distributed training, where every rank must run the same forward passes.

    Sharded models gather weights in every pass and DDP sends buffers: a rank that skipped a pass, because no row of its
    batch needs it, would leave the others waiting.
    """
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_fsdp(module: nn.Module) -> bool:
    """Return True if FSDP2 manages this module (`torch.distributed.fsdp.fully_shard`)."""
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def is_partitioned(module: nn.Module) -> bool:
    """Return True if DeepSpeed ZeRO-3 partitions this module's parameters, gathered at the moment or not."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return the module's class without those that FSDP2 puts in front: (FSDP<Name>, FSDPModule, <Name>, ...)."""
    return cast(type[nn.Module], type(module).__mro__[2]) if is_fsdp(module) else type(module)


def foreign_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Return the module's hooks, except those of FSDP2 and ZeRO-3, which only gather its weights."""
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    hooks = [hook for hooks in kinds for hook in hooks.values()]
    return [hook for hook in hooks if not _defining_module(hook).startswith(("torch.distributed.fsdp", "deepspeed."))]


def _defining_module(hook: Callable[..., Any]) -> str:
    """Return the name of the Python module that defines a hook, inside `functools.partial` and decorators."""
    inner = getattr(hook, "func", None) or getattr(hook, "__wrapped__", None)
    return _defining_module(inner) if inner is not None else getattr(hook, "__module__", None) or ""


def has_replaced_forward(module: nn.Module) -> bool:
    """Return True if another library has set a `forward` on this instance, as Accelerate's hooks do."""
    own = vars(module).get("forward")
    return own is not None and not isinstance(own, _InPlace)


def call_gathered(module: nn.Module, states: Tensor) -> Tensor:
    """Call a module whose weights are gathered, without FSDP2's hooks: they expect the model's own order of calls."""
    return class_of(module).forward(module, states) if is_fsdp(module) else module(states)


def in_place_of_forward(module: nn.Module, function: Callable[..., _Result], *tensors: Tensor) -> _Result:
    """Call `module(*tensors)` with `function` as its forward, so that its hooks gather its weights around the call.

    They gather them again for the gradients of the result.
    """
    with forward_set(module, _InPlace(function)):
        return module(*tensors)


@contextmanager
def forward_set(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the context this instance has another forward; one that another library has set comes back after it."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


class _InPlace(partial):
    """A forward set by `in_place_of_forward`, recognized by its class."""


def whole(tensor: Tensor, *, frozen: bool) -> Tensor:
    """Return a parameter as a plain tensor; a shard (`DTensor`) that is not gathered yet is gathered here.

    Its gradient goes back to the shards as FSDP2's does, as the mean over all ranks; none with `frozen`.
    """
    tensor = tensor.detach() if frozen else tensor
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Partial

    sharded = cast(DTensor, tensor)
    gathered = sharded.full_tensor(grad_placements=[Partial()] * sharded.device_mesh.ndim)
    if gathered.requires_grad:
        gathered.register_hook(lambda gradient: gradient / sharded.device_mesh.size())
    return gathered
