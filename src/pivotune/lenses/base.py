"""A lens maps raw states of an inner layer to states that the frozen final norm and head can read."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Lens(Protocol):
    """Built once for a model, registered in `pivotune.config.registry.LENSES` as a callable of its `Architecture`.

    The objectives apply it to one term at a time, then call the head once for all terms. A lens with `maps` is fitted on
    the starting model before training (`pivotune.lenses.tuned.TunedLens`).
    """

    def __call__(self, hidden_states: Tensor, layer: int) -> Tensor:
        """Map raw `h_k` (..., width) of layer k to states (..., width) in the basis of the last layer."""
        ...
