"""Weights that several processes share out among them: how the losses, which run outside the model's forward, read them.

- FSDP2 keeps every parameter as a shard and gathers a module's parameters around its forward. Accelerate puts the head,
  the embedding that it may be tied to and the final norm (where it finds one; it does not below adapters) into a group
  that stays gathered from the forward to the backward pass, as the root's own parameters do. So both are plain tensors
  when the losses read them.
- ZeRO-3 replaces parameters by empty tensors and gathers a module's own around its call. What reads them runs in the
  place of the module's forward (`in_place_of_forward`), one call for each loss, the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

_Result = TypeVar("_Result")


def in_lockstep() -> bool:
    """Whether other ranks run beside this one, so that all have to run the same forward passes.

    Sharded models gather weights in every pass and DDP sends buffers: a rank that leaves out a pass, because no row of its
    batch needs it, would leave the others waiting.
    """
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 manages this module (`torch.distributed.fsdp.fully_shard`)."""
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def is_partitioned(module: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 keeps parameters of this module in parts; they may happen to be gathered just now."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def compute_device(parameter: Tensor) -> torch.device:
    """Where a parameter is computed with: the device of its mesh for a shard, wherever the shard itself is kept."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None or mesh.device_type == "cpu":
        return parameter.device
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class as its author wrote it: FSDP2 puts a class of its own in front."""
    # FSDP2 makes (FSDP<Name>, FSDPModule, <Name>, ...).
    return cast(type[nn.Module], type(module).__mro__[2]) if is_fsdp(module) else type(module)


def foreign_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The module's hooks but for those that only bring its weights there (FSDP2, ZeRO-3)."""
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    hooks = [hook for hooks in kinds for hook in hooks.values()]
    return [hook for hook in hooks if not _module_of(hook).startswith(("torch.distributed.fsdp", "deepspeed."))]


def has_replaced_forward(module: nn.Module) -> bool:
    """Whether somebody else put a forward of their own on this very module, as Accelerate's hooks do."""
    own = vars(module).get("forward")
    return own is not None and not isinstance(own, _InPlace)


def call_gathered(module: nn.Module, states: Tensor) -> Tensor:
    """Call a module whose weights are gathered now, without FSDP2's hooks: they count on the model's own order of calls."""
    return class_of(module).forward(module, states) if is_fsdp(module) else module(states)


def in_place_of_forward(module: nn.Module, function: Callable[..., _Result], *tensors: Tensor) -> _Result:
    """Call `module(*tensors)` with `function` in the place of its forward, so that its hooks gather its weights around it.

    The gradients of what `function` returns find the weights gathered too.
    """
    before = vars(module).get("forward")
    module.forward = _InPlace(function)
    try:
        return module(*tensors)
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def whole(tensor: Tensor, *, frozen: bool) -> Tensor:
    """A parameter as a plain tensor: a shard (`DTensor`) that nothing has gathered is gathered here.

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


class _InPlace:
    """A forward of ours on a module, known by its class."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *tensors: Tensor) -> Any:
        return self._function(*tensors)


def _module_of(hook: Callable[..., Any]) -> str:
    """Where a hook was written; what wraps it (`functools.partial`, decorators) counts as what it wraps."""
    inner = getattr(hook, "func", None) or getattr(hook, "__wrapped__", None)
    return _module_of(inner) if inner is not None else getattr(hook, "__module__", None) or ""
