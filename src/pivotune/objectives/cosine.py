"""The feature signal: pooled inner states of the target text move towards those of the English text.

L_LC = 1 - cos(h_i(x_en), h_i(x)) and L_ET = 1 - cos(h_L(x_en...), h_j(x...)) (arXiv 2503.01275, section "Deep
supervision with features"): for conversion both sides at layer i, for thinking the English side at the top layer and the
target side at layer j. The span is the query, or query and answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pivotune.config.supervision import FeatureConfig, SupervisionConfig
from pivotune.forward.passes import Batch, Passes, PassRequest
from pivotune.lenses.base import Lens
from pivotune.models.architecture import Architecture
from pivotune.models.head import frozen_norm
from pivotune.models.taps import Taps
from pivotune.objectives.base import InnerLoss, LossTerm, no_loss

Pooling = Literal["mean", "last"]
Span = Literal["query", "query+answer"]


class PooledLoss(ABC):
    """A loss over pooled raw states of both languages, read without a lens.

    Args:
        options: with `span`, the pooled tokens.
    """

    uses_lens = False

    def __init__(self, options: Any) -> None:
        self.options = options

    def count(self, loss: InnerLoss, batch: Batch) -> Tensor:
        """Count the rows whose span has tokens on both sides."""
        return compared_rows(batch, self.options.span).sum()

    def __call__(
        self, losses: Sequence[InnerLoss], passes: Passes, batch: Batch, architecture: Architecture, lens: Lens
    ) -> dict[str, LossTerm]:
        """Return the losses by name."""
        return {loss.name: self.term(loss, passes, batch, architecture) for loss in losses}

    @abstractmethod
    def term(self, loss: InnerLoss, passes: Passes, batch: Batch, architecture: Architecture) -> LossTerm:
        """Return one loss."""


class Cosine(PooledLoss):
    """Cosine distance between the pooled states of both languages, a row at a time."""

    additive = True
    options: FeatureConfig

    def request(
        self, losses: Sequence[InnerLoss], batch: Batch, architecture: Architecture, reference: nn.Module | None
    ) -> PassRequest:
        """Ask for the target's states, and for an English pass where the batch does not carry its pooled vectors.

        Raises:
            ValueError: `english: frozen` without the starting model and without its vectors.
        """
        open_losses = [loss for loss in losses if self._pooled_english(batch, loss) is None]
        frozen = self.options.english == "frozen"
        if frozen and reference is None and open_losses:
            raise ValueError(
                "english='frozen' needs the starting model as `reference`, or its vectors in the batch as "
                f"`english_features_{open_losses[0].name}`"
            )
        return PassRequest(
            main_layers=frozenset(loss.layer for loss in losses),
            english_layers=frozenset(english_layer(loss, architecture.num_layers) for loss in open_losses),
            english_gradient=self.options.english == "joint",
            reference=reference if frozen else None,
        )

    def term(self, loss: InnerLoss, passes: Passes, batch: Batch, architecture: Architecture) -> LossTerm:
        target, options = passes.main.hidden_states[loss.layer], self.options
        pooled = self._pooled_english(batch, loss)
        if pooled is not None:
            return pooled_feature_loss(target, pooled, batch, pooling=options.pooling, span=options.span)
        if passes.english is None:
            return no_loss(batch)
        english = english_states(passes.english, loss, architecture, options)
        if options.english != "joint":
            english = english.detach()
        return feature_loss(target, english, batch, pooling=options.pooling, span=options.span)

    def _pooled_english(self, batch: Batch, loss: InnerLoss) -> Tensor | None:
        """Return the starting model's vectors where they were computed before training."""
        return batch.get(f"english_features_{loss.name}") if self.options.english == "frozen" else None


def frozen_losses(supervision: SupervisionConfig) -> list[InnerLoss]:
    """Return the losses that compare with the frozen starting model; layers must be chosen."""
    if supervision.feature.english != "frozen":
        return []
    active = supervision.active().items()
    return [InnerLoss(name, int(term.layer)) for name, term in active if term.signal == "feature"]


def feature_loss(target: Tensor, english: Tensor, batch: Batch, *, pooling: Pooling, span: Span) -> LossTerm:
    """Return the sum of `1 - cos(pool(english), pool(target))` over the rows with both spans, and their number.

    Args:
        target: states of the main sequence, (B, T, width).
        english: states of the English sequence, (B, S, width); detach them before for a one-sided gradient.
        batch: gives the spans, see the batch contract.

    Returns:
        Sum in [0, 2 * rows], float32. A row without an English side, or with an empty query on one side, adds neither to
        the sum nor to the count.
    """
    mask = span_masks(batch, span)[1]
    # In distributed training the English pass reads one token where no row has an English side.
    pooled = pool(english[:, : mask.shape[1]], mask, pooling)
    return pooled_feature_loss(target, pooled, batch, pooling=pooling, span=span)


def pooled_feature_loss(
    target: Tensor, pooled_english: Tensor, batch: Batch, *, pooling: Pooling, span: Span
) -> LossTerm:
    """Return `feature_loss` for an English side that is already pooled.

    Args:
        pooled_english: (B, width); the values of rows without an English side are ignored.
    """
    target_mask, rows = span_masks(batch, span)[0], compared_rows(batch, span)
    distances = 1 - F.cosine_similarity(pooled_english.float(), pool(target, target_mask, pooling), dim=-1)
    # Indexing by the mask would wait for a GPU.
    return LossTerm(torch.where(rows, distances, 0.0).sum(), rows.sum())


def span_masks(batch: Mapping[str, Tensor], span: Span) -> tuple[Tensor, Tensor]:
    """Return the tokens that are pooled on the target side (B, T) and the English side (B, S)."""
    target, english = batch["query_mask"], batch["english_query_mask"]
    if span == "query+answer":
        target, english = target | (batch["labels"] >= 0), english | batch["english_answer_mask"]
    return target, english


def compared_rows(batch: Mapping[str, Tensor], span: Span) -> Tensor:
    """Return True for the rows (B,) with a token to pool on both sides."""
    target, english = span_masks(batch, span)
    return target.any(dim=1) & english.any(dim=1)


def pool(hidden_states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Pool (B, T, width) over the true places of `mask` (B, T) into (B, width), float32.

    `mean` averages them, `last` takes the last of them. A row without any gives zeros for `mean`; for `last` its first
    place, or zeros where there are no places at all.
    """
    if pooling == "last" and mask.shape[1]:
        # The running count reaches its maximum first at the last true place.
        last = mask.long().cumsum(dim=1).argmax(dim=1)
        return hidden_states[torch.arange(len(last), device=last.device), last].float()
    weights = mask.float()
    summed = (hidden_states.float() * weights[..., None]).sum(dim=1)
    return summed / weights.sum(dim=1, keepdim=True).clamp(min=1)


def english_layer(loss: InnerLoss, num_layers: int) -> int:
    """Return the layer of the English side: conversion compares with its own layer, thinking with the top."""
    return num_layers if loss.name == "thinking" else loss.layer


def english_states(english: Taps, loss: InnerLoss, architecture: Architecture, options: FeatureConfig) -> Tensor:
    """Return the English side's states (B, S, width) that a loss compares with.

    A joint gradient reaches the states below the final norm, not the norm's weights, as for all inner losses.
    """
    if loss.name == "conversion" or options.english_norm == "raw":
        return english.hidden_states[english_layer(loss, architecture.num_layers)]
    if options.english == "joint":
        return frozen_norm(architecture, english.hidden_states[architecture.num_layers])
    # The pass's own norm: that of the starting model for `frozen`.
    assert english.final is not None
    return english.final
