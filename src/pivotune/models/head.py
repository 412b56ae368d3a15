"""The final norm and the LM head with their weights detached, as inner losses and the lens use them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pivotune.models.architecture import Architecture
from pivotune.models.sharding import (
    class_of,
    foreign_hooks,
    has_replaced_forward,
    in_place_of_forward,
    is_fsdp,
    is_partitioned,
)

_MIB = 2**20


def frozen_norm(architecture: Architecture, hidden_states: Tensor) -> Tensor:
    """Apply the final norm; gradient reaches `hidden_states` (..., width), never the norm's weights."""
    return _call_frozen(architecture.final_norm, hidden_states)


def readout(architecture: Architecture, normed: Tensor, *, frozen: bool) -> Tensor:
    """Return logits (..., vocabulary) of normed states (..., width).

    With `frozen` the head takes part in the forward pass and gets no gradient, even if it is the embedding matrix.
    """
    head = architecture.lm_head
    return architecture.transform_logits(_call_frozen(head, normed) if frozen else head(normed))


def logit_blocks(architecture: Architecture, normed: Tensor, columns: int) -> Iterator[tuple[int, Tensor]]:
    """Yield logits of normed states (R, width), `columns` tokens of the vocabulary at a time: (first token, (R, columns)).

    All share one buffer: a block may be overwritten, and the next one replaces it. A head that must be called as a module
    (see `plain_head`) gives one block, the whole vocabulary. For use without gradient.
    """
    head = plain_head(architecture)
    if head is None:
        yield 0, readout(architecture, normed, frozen=True)
        return
    normed = normed.to(head.weight.dtype)
    buffer = normed.new_empty(len(normed) * min(columns, len(head.weight)))
    for start in range(0, len(head.weight), columns):
        weight = head.weight.detach()[start : start + columns]
        logits = buffer[: len(normed) * len(weight)].view(len(normed), len(weight))
        torch.mm(normed, weight.T, out=logits)
        if head.bias is not None:
            logits += head.bias.detach()[start : start + columns]
        # `Architecture.transform_logits` without fresh memory.
        if architecture.logit_scale != 1.0:
            logits *= architecture.logit_scale
        if architecture.softcap is not None:
            logits.div_(architecture.softcap).tanh_().mul_(architecture.softcap)
        yield start, logits


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Return how many rows of logits (rows, vocabulary) to make at once, for uses that need whole rows.

    On a CPU 24 MiB of float32: at 576 x 49,152 chunks of 128 rows were faster than of 64 and of 256. On a GPU 256 MiB.
    """
    budget, least = (24 * _MIB, 64) if device.type == "cpu" else (256 * _MIB, 256)
    return min(max(budget // (4 * vocab_size), least), 4096)


def plain_head(architecture: Architecture) -> nn.Linear | None:
    """Return the LM head if it is exactly `lm_head.weight @ h + bias` with an ordinary floating-point matrix.

    None for a head with a wrapper, adapter, quantization, hook or sharded tensor in between, which must be called as a
    module.
    """
    head = architecture.lm_head
    return cast(nn.Linear, head) if is_plain_linear(head) and is_plain_matrix(cast(Tensor, head.weight)) else None


def is_plain_linear(module: nn.Module) -> bool:
    """Return True if a module computes exactly `nn.Linear`, which subclasses, hooks and a replaced forward may not.

    FSDP2's and ZeRO-3's hooks only gather weights; Accelerate's replace `forward` on the instance.
    """
    return class_of(module) is nn.Linear and not foreign_hooks(module) and not has_replaced_forward(module)


def is_plain_matrix(weight: Tensor) -> bool:
    """Return False for a weight that is quantized (a subclass, or integers), partitioned (empty) or off-loaded (meta)."""
    ordinary = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.ndim == 2
    return ordinary and weight.numel() > 0 and weight.device.type != "meta"


def _call_frozen(module: nn.Module, states: Tensor) -> Tensor:
    """Call a module (which may hold adapters) with all its parameters detached; the module itself is not changed."""
    if is_partitioned(module):
        return in_place_of_forward(module, partial(_call_copy, module), states)
    if is_fsdp(module):
        return _call_copy(module, states)
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return functional_call(module, weights, (states,))


def _call_copy(module: nn.Module, states: Tensor) -> Tensor:
    """Same as `_call_frozen` on copies: weights that are gathered now may be gone in the backward pass."""
    copies = {f"module.{name}": parameter.detach().clone() for name, parameter in module.named_parameters()}
    return functional_call(_Unhooked(module), copies, (states,))


class _Unhooked(nn.Module):
    """A module's own forward without the hooks that gather its weights, which expect the model's own order of calls."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, states: Tensor) -> Tensor:
        return class_of(self.module).forward(self.module, states)
