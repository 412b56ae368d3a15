"""Dry run of one training step on fake tensors: the real losses and backward pass, without their memory.

The model is cut to two blocks between any two layers that matter (where a branch leaves, where a loss reads), and the
second block's part of the timeline is repeated as often as the whole model has such blocks. Everything else is the code of
training.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pivotune.config.registry import LENSES
from pivotune.config.supervision import SupervisionConfig
from pivotune.forward.passes import Forward, choose_passes
from pivotune.lenses.base import Lens
from pivotune.lenses.tuned import TunedLens
from pivotune.models.architecture import find_architecture
from pivotune.models.sharding import assumed_device_kind
from pivotune.objectives.base import weighted_total
from pivotune.objectives.deep_supervision import DeepSupervisionLoss

# The first block after a cut differs (branches are cut off before it), the second stands for the rest.
_BLOCKS_KEPT = 2
_ATEN = torch.ops.aten
_INDEXED = (_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default)
# Columns of a timeline.
ACTIVATIONS, GRADIENTS, WEIGHT_CASTS = range(3)


def dry_step(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    supervision: SupervisionConfig,
    *,
    device: str,
    autocast: bool,
    checkpointing: bool = False,
    accumulated: bool = False,
    forward: Forward = "auto",
) -> Timeline:
    """Return the allocations of one micro-batch, forward and backward.

    Args:
        model: on the meta device, with its adapters; it is cut and changed, so build one for every call.
        batch: as `DeepSupervisionCollator` makes it, real tensors on the CPU.
        device: `cpu` or `cuda`, whose kernels and chunk sizes are used.
        autocast: matrix products run in bfloat16.
        accumulated: gradients of an earlier micro-batch exist already.
    """
    supervision, times = _cut(model, supervision)
    # Fake tensors on the CPU, whose kernels autograd and autocast choose as for real ones.
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    base.tie_weights()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted[name])
    if accumulated:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
    before = [p.grad for p in model.parameters() if p.grad is not None]
    log = AllocationLog(held=[*model.parameters(), *model.buffers(), *before], weights=model.parameters())
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(assumed_device_kind(device))
        if checkpointing:
            # `Trainer` uses non-reentrant checkpoints by default; reentrant ones keep the same tensors.
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        stack.enter_context(_parts(model, log))
        stack.enter_context(log)
        model.train()
        run_passes = choose_passes(model, forward)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            losses = DeepSupervisionLoss(supervision, lens=_unfitted_lens(model, supervision), run_passes=run_passes)
            terms = losses.terms(model, batch)
            loss = weighted_total(terms, dict.fromkeys(terms, 1.0), losses.counts(batch))
        del terms
        log.in_backward = True
        log.begin("backward")
        loss.backward()
        del loss
    gradients = [] if accumulated else [p.grad for p in model.parameters() if p.grad is not None]
    return log.timeline(gradients, times)


def _unfitted_lens(model: nn.Module, supervision: SupervisionConfig) -> Lens:
    """Return the run's lens; a tuned one with maps of the right shape."""
    architecture = find_architecture(model)
    lens: Lens = LENSES[supervision.lens](architecture)
    if isinstance(lens, TunedLens):
        width = architecture.head_weight.shape[1]
        layers = {int(term.layer) for term in supervision.active().values()}
        lens.maps = {layer: (torch.empty(width, width), torch.empty(width)) for layer in layers}
    return lens


def _cut(model: nn.Module, supervision: SupervisionConfig) -> tuple[SupervisionConfig, dict[str, int]]:
    """Drop blocks that repeat; return the inner losses at their new layers, and the repeat count of each part."""
    architecture = find_architecture(model)
    layers = sorted({int(term.layer) for term in supervision.active().values()} - {0, architecture.num_layers})
    borders = [0, *layers, architecture.num_layers]
    kept: list[int] = []
    new_layers = {architecture.num_layers: 0}
    times: dict[str, int] = {}
    for start, stop in pairwise(borders):
        kept += range(start, min(start + _BLOCKS_KEPT, stop))
        new_layers[stop] = len(kept)
        if stop - start > _BLOCKS_KEPT:
            repeats = stop - start - _BLOCKS_KEPT + 1
            times |= {f"{direction} {len(kept) - 1}": repeats for direction in ("forward", "backward")}
    blocks = nn.ModuleList(architecture.blocks[index] for index in kept)
    setattr(architecture.decoder, architecture.blocks_name, blocks)
    terms = {
        name: term.model_copy(update={"layer": new_layers[int(term.layer)]})
        for name, term in supervision.active().items()
    }
    return supervision.model_copy(update=terms), times


@contextmanager
def _parts(model: nn.Module, log: AllocationLog) -> Iterator[None]:
    """Mark in the log where every block begins, forward and backward."""

    def hooks(index: int, block: nn.Module) -> tuple[Any, Any]:
        def forward(*_: Any) -> None:
            # Checkpointing repeats a block in the backward pass: that belongs to the block's backward part.
            if not log.in_backward:
                log.begin(f"forward {index}")

        def backward(module: nn.Module, args: Any, output: Any) -> None:
            if log.in_backward:
                return
            log.begin("between")
            states = output[0] if isinstance(output, tuple) else output
            if states.requires_grad:
                states.register_hook(lambda gradient: log.begin(f"backward {index}"))

        return block.register_forward_pre_hook(forward), block.register_forward_hook(backward)

    installed = [hook for index, block in enumerate(find_architecture(model).blocks) for hook in hooks(index, block)]
    try:
        yield
    finally:
        for hook in installed:
            hook.remove()


class AllocationLog(TorchDispatchMode):
    """Record when each storage of a fake tensor is allocated and freed, except for tensors `held` before.

    Copies of `weights` into autocast's dtype are counted apart.
    """

    def __init__(self, *, held: Iterable[Tensor], weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._held = {_storage_id(tensor) for tensor in held}
        self._weights = {_storage_id(tensor) for tensor in weights}
        self._live: dict[int, tuple[int, Any]] = {}
        # Storage number, bytes and index of the part of each allocation (positive) and each release (negative).
        self._events: list[tuple[int, int, int]] = []
        self._casts: set[int] = set()
        self._parts: list[str] = ["start"]
        self._made = 0
        self.in_backward = False

    def begin(self, part: str) -> None:
        """Assign the following events to `part`."""
        self._parts.append(part)

    def timeline(self, gradients: Iterable[Tensor], times: Mapping[str, int]) -> Timeline:
        """Return the log so far with the named parts repeated; `gradients` are the live gradients of the parameters.

        Autocast drops its weight copies when it ends, those of all blocks at once: copies of a repeated part are scaled.
        """
        made_in = {storage: self._parts[part] for storage, delta, part in self._events if delta >= 0}
        of_gradients = {self._live[_storage_id(tensor)][0] for tensor in gradients if _storage_id(tensor) in self._live}
        parts: list[list[np.ndarray]] = [[] for _ in self._parts]
        for storage, delta, part in self._events:
            is_cast = storage in self._casts
            column = GRADIENTS if storage in of_gradients else WEIGHT_CASTS if is_cast else ACTIVATIONS
            scaled: float = delta
            if column == WEIGHT_CASTS and delta < 0:
                scaled = delta * (times.get(made_in[storage], 1) / times.get(self._parts[part], 1))
            parts[part].append(np.eye(3)[column] * scaled)
        named = zip(self._parts, parts, strict=True)
        return Timeline([(name, np.stack(one)) for name, one in named if one]).repeated(times)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in _INDEXED:
            # The number of places that a mask selects is known for a real mask, and must not be asked of a fake one.
            places: list[Any] = []
            for index in args[1]:
                is_mask = isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
                places += index.nonzero(as_tuple=True) if is_mask else [index]
            args = (args[0], places, *args[2:])
        result = func(*args, **(kwargs or {}))
        copies_weight = func is _ATEN._to_copy.default and _storage_id(args[0]) in self._weights
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor):
                self._record(tensor, copies_weight)
        return result

    def _record(self, tensor: Tensor, copies_weight: bool) -> None:
        storage, key = tensor.untyped_storage(), _storage_id(tensor)
        if key in self._held or key in self._live:
            return
        self._made += 1
        number, size = self._made, storage.nbytes()
        if copies_weight:
            self._casts.add(number)
        self._events.append((number, size, len(self._parts) - 1))

        def freed(_: Any) -> None:
            self._live.pop(key, None)
            self._events.append((number, -size, len(self._parts) - 1))

        self._live[key] = number, weakref.ref(storage, freed)


@dataclass(frozen=True)
class Timeline:
    """Changes of the allocated bytes by part, in order: (name, (events, 3)) with the columns of this module."""

    parts: list[tuple[str, np.ndarray]]

    def repeated(self, times: Mapping[str, int]) -> Timeline:
        """Return the timeline of a model in which the named parts occur this many times in a row, the others once."""
        return Timeline([(name, np.tile(deltas, (times.get(name, 1), 1))) for name, deltas in self.parts])

    def peak(self, *, gradients: float = 1.0, weight_casts: float = 1.0) -> float:
        """Return the peak bytes, with the given share of the gradients and of the weight copies counted."""
        if not self.parts:
            return 0.0
        shares = np.array([1.0, gradients, weight_casts])
        alive = np.concatenate([deltas for _, deltas in self.parts]) @ shares
        return max(0.0, float(alive.cumsum().max()))


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
