"""Loss terms as sums and counts, and the seam for the losses of inner layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pivotune.config.supervision import InnerTerm
from pivotune.forward.passes import Batch, Passes, PassRequest
from pivotune.lenses.base import Lens
from pivotune.models.architecture import Architecture


class LossTerm(NamedTuple):
    """A loss as a sum and a count, so that it can be normalised over any accumulation window and number of ranks.

    `sum`: scalar tensor with gradient; `count`: the number of items it sums over (tokens or rows), an integer tensor.
    """

    sum: Tensor
    count: Tensor


class InnerLoss(NamedTuple):
    """One inner loss: `conversion` (L_LC) or `thinking` (L_ET), read after `layer` blocks."""

    name: InnerTerm
    layer: int


class Objective(Protocol):
    """A loss of inner layers; registered in `pivotune.config.registry.OBJECTIVES` under the value of `signal`.

    The registry calls the entry with its options section (None without options) and gets the objective. One objective
    computes all terms that ask for it, so that they can share one call of the LM head.

    Attributes:
        additive: True where the loss is a sum over items, so that 1 x 8 = 8 x 1 = 2 ranks. A loss over pairs of rows is
            not additive: it compares the rows of one micro-batch, and other micro-batches train differently. If it has a
            method `start_window`, that is called before each accumulation window.
        uses_lens: whether it reads states through the lens, which may have to be fitted for its layers.
    """

    additive: bool
    uses_lens: bool

    def request(
        self, losses: Sequence[InnerLoss], batch: Batch, architecture: Architecture, reference: nn.Module | None
    ) -> PassRequest:
        """Return the states that the forward must provide; `reference` is the frozen starting model, if there is one."""
        ...

    def count(self, loss: InnerLoss, batch: Batch) -> Tensor:
        """Return the number of items of a loss from the masks of a batch alone; equals the count of its term."""
        ...

    def __call__(
        self, losses: Sequence[InnerLoss], passes: Passes, batch: Batch, architecture: Architecture, lens: Lens
    ) -> Mapping[str, LossTerm]:
        """Return name -> term. A loss may be left out where the batch has nothing for it."""
        ...


def no_loss(batch: Batch) -> LossTerm:
    """Return a zero with count 0 on the batch's device."""
    zero = torch.zeros((), device=batch["labels"].device)
    return LossTerm(zero, zero.long())


def weighted_total(
    terms: Mapping[str, LossTerm], weights: Mapping[str, float], counts: Mapping[str, Tensor | int]
) -> Tensor:
    """Return `sum_t weights[t] * terms[t].sum / counts[t]`, in float32.

    Args:
        terms: the terms of this micro-batch.
        weights: weight of each term.
        counts: the counts of the whole accumulation window over all ranks. A term whose count is 0 adds nothing.
    """
    total = torch.zeros((), device=next(iter(terms.values())).sum.device)
    for name, term in terms.items():
        count = torch.as_tensor(counts[name], device=total.device)
        total = total + weights[name] * term.sum.float() / count.clamp(min=1)
    return total


def schedule_factor(schedule: Literal["constant", "linear", "cosine"], step: int, num_steps: int) -> float:
    """Return the factor on the weights of the inner losses: from 1 at step 0 down to 0 at the last of `num_steps`."""
    if schedule == "constant" or num_steps <= 1:
        return 1.0
    progress = min(step / (num_steps - 1), 1.0)
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
