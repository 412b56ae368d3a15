"""The logit lens: the output of the model if it stopped after layer k; and the lens that runs its other layers.

`logits_k = transform(W_out norm(h_k))`, with the final norm recomputed from `h_k` itself and the soft-cap and logit
scale that the model applies to its own logits (nostalgebraist 2020, "interpreting GPT: the logit lens"). The paper
reads layer entropies and inner losses through this lens (arXiv 2503.01275, sections "Critical layers" and "Method").
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pivotune.models.architecture import Architecture, find_architecture
from pivotune.models.head import frozen_norm, readout
from pivotune.models.taps import tap


class LogitLens:
    """The identity: raw states are read as if they were those of the last layer."""

    def __init__(self, architecture: Architecture) -> None:
        pass

    def __call__(self, hidden_states: Tensor, layer: int) -> Tensor:
        """Return the states as they are."""
        return hidden_states


class ModelLens(LogitLens):
    """The model's own upper layers (`lens: model`): the truest reading, at the price of a full-depth branch.

    The identity on `h_L`: the forward runs the branches on to the last layer, with everything above their own layer
    detached (`pivotune.forward.passes.PassRequest`).
    """

    branches_to_top = True


def lens_logits(architecture: Architecture, hidden_states: Tensor) -> Tensor:
    """Return the logits (..., vocabulary) of raw states `h_k` (..., width) through the frozen final norm and head."""
    return readout(architecture, frozen_norm(architecture, hidden_states), frozen=True)


@torch.no_grad()
def check_lens(model: nn.Module, input_ids: Tensor | None = None) -> float:
    """Return the largest absolute difference between the lens at the last layer and the model's own logits.

    Checks a newly registered architecture: the difference should be at rounding level.
    """
    architecture = find_architecture(model)
    if input_ids is None:
        device = architecture.device
        input_ids = torch.arange(2, 18, device=device).remainder(architecture.vocab_size)[None]
    with tap(architecture, [architecture.num_layers]) as taps:
        logits = model(input_ids=input_ids, use_cache=False).logits
    lens = lens_logits(architecture, taps.hidden_states[architecture.num_layers])
    return (lens - logits).abs().max().item()
