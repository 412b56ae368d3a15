"""When fake tensors come and go: the memory of a computation that never runs.

`AllocationLog` watches every operation on fake tensors and notes each storage when it is made and when it is gone.
`Timeline` turns the notes into the bytes that are alive at any time, by kind, and can repeat the part of one decoder
block as often as the model has such blocks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ATEN = torch.ops.aten
_INDEXED = (_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default)
# Columns of a timeline.
ACTIVATIONS, GRADIENTS, WEIGHT_CASTS = range(3)


class _Event(NamedTuple):
    storage: int
    delta: int
    part: int


class AllocationLog(TorchDispatchMode):
    """Notes every storage of a fake tensor that an operation makes, and when nothing holds it any more.

    Args:
        held: tensors that are there before and do not count: parameters and buffers.
        weights: those of them that autocast may copy into its dtype; such copies are counted apart.
    """

    def __init__(self, *, held: Iterable[Tensor], weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._held = {_storage_id(tensor) for tensor in held}
        self._weights = {_storage_id(tensor) for tensor in weights}
        self._live: dict[int, tuple[int, Any]] = {}
        self._events: list[_Event] = []
        self._casts: set[int] = set()
        self._parts: list[str] = ["start"]
        self._made = 0
        self.in_backward = False

    def begin(self, part: str) -> None:
        """What follows belongs to `part`."""
        self._parts.append(part)

    def begin_backward(self) -> None:
        """What follows is the backward pass."""
        self.in_backward = True
        self.begin("backward")

    def hold(self, tensor: Tensor) -> None:
        """Leave one more tensor out of the count."""
        self._held.add(_storage_id(tensor))

    def timeline(self, gradients: Iterable[Tensor], times: Mapping[str, int]) -> Timeline:
        """The log so far, with the named parts repeated; `gradients` are the parameters' gradients that are alive.

        Autocast drops its copies of weights when it ends, all blocks' at once: those of a repeated part count so often.
        """
        made_in = {event.storage: self._parts[event.part] for event in self._events if event.delta >= 0}
        of_gradients = {self._live[_storage_id(tensor)][0] for tensor in gradients if _storage_id(tensor) in self._live}
        parts: list[tuple[str, list[tuple[int, float]]]] = [(name, []) for name in self._parts]
        for event in self._events:
            column = (
                GRADIENTS
                if event.storage in of_gradients
                else WEIGHT_CASTS
                if event.storage in self._casts
                else ACTIVATIONS
            )
            here = self._parts[event.part]
            factor = times.get(made_in[event.storage], 1) / times.get(here, 1)
            scaled = column == WEIGHT_CASTS and event.delta < 0
            parts[event.part][1].append((column, event.delta * factor if scaled else event.delta))
        return Timeline([(name, _columns(events)) for name, events in parts if events]).repeated(times)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in _INDEXED:
            # How many places a mask chooses is known where the mask is real, and must not be asked of a fake one.
            args = (args[0], _as_places(args[1]), *args[2:])
        result = func(*args, **(kwargs or {}))
        copies_weight = func is _ATEN._to_copy.default and _storage_id(args[0]) in self._weights
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor):
                self._note(tensor, copies_weight)
        return result

    def _note(self, tensor: Tensor, copies_weight: bool) -> None:
        storage, key = tensor.untyped_storage(), _storage_id(tensor)
        if key in self._held or key in self._live:
            return
        self._made += 1
        number, size = self._made, storage.nbytes()
        if copies_weight:
            self._casts.add(number)
        self._events.append(_Event(number, size, len(self._parts) - 1))

        def gone(_: Any) -> None:
            self._live.pop(key, None)
            self._events.append(_Event(number, -size, len(self._parts) - 1))

        self._live[key] = number, weakref.ref(storage, gone)


@dataclass(frozen=True)
class Timeline:
    """Changes in allocated bytes by part, in order: (name, (events, 3)) with the columns of this module."""

    parts: list[tuple[str, np.ndarray]]

    def repeated(self, times: Mapping[str, int]) -> Timeline:
        """The timeline of a model in which the named parts come so many times in a row; others come once."""
        return Timeline([(name, np.tile(deltas, (times.get(name, 1), 1))) for name, deltas in self.parts])

    def peak(self, *, gradients: float = 1.0, weight_casts: float = 1.0) -> float:
        """Most bytes alive at once, with the given share of the gradients and of the copies of weights counted."""
        if not self.parts:
            return 0.0
        shares = np.array([1.0, gradients, weight_casts])
        alive = np.concatenate([deltas for _, deltas in self.parts]) @ shares
        return max(0.0, float(alive.cumsum().max()))


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _columns(events: list[tuple[int, float]]) -> np.ndarray:
    deltas = np.zeros((len(events), 3))
    for row, (column, delta) in enumerate(events):
        deltas[row, column] = delta
    return deltas


def _as_places(indices: Any) -> list[Any]:
    places = []
    for index in indices:
        mask = isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        places += index.nonzero(as_tuple=True) if mask else [index]
    return places
