"""Count the peak memory of tensors. A process's own memory depends on everything that ran in it before."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """Peak of the bytes of all tensors made inside that are still alive: the same at every run."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._known.update(self._storages((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        for storage in self._storages(result):
            if storage not in self._known:
                self._known.add(storage)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result

    def _freed(self, size: int) -> None:
        self.alive -= size

    @staticmethod
    def _storages(tree) -> list:
        return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak(run: Callable[[], None]) -> int:
    """Return the peak bytes of `run`, without garbage collection, whose timing depends on earlier tests."""
    gc.collect()
    gc.disable()
    try:
        with PeakBytes() as counted:
            run()
    finally:
        gc.enable()
    return counted.peak
