"""The model's own upper layers as the lens (`lens: model`): the truest reading, at the price of a full-depth branch."""

from __future__ import annotations

from torch import Tensor

from pivotune.models.architecture import Architecture


class ModelLens:
    """The identity on `h_L`: branches run on to the last layer, with everything above their own layer detached."""

    # The forward provides the states (`pivotune.forward.passes.PassRequest`).
    branches_to_top = True

    def __init__(self, architecture: Architecture) -> None:
        pass

    def __call__(self, hidden_states: Tensor, layer: int) -> Tensor:
        """Return the states as they are."""
        return hidden_states
