"""The logits signal: inner layers predict English tokens through the model's own frozen head.

L_LC = -log P(x_en | x; layers 1..i, W_out) and L_ET = -log P(y_en | x; layers 1..j, W_out) (arXiv 2503.01275, section
"Deep supervision with logits"). The paper leaves open how a sequence is predicted at an inner layer (docs/method.md).
`autoregressive` is the chain rule; `positional` puts the English tokens on the target's positions, cut to the shorter side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pivotune.config.supervision import LogitsConfig
from pivotune.forward.passes import Batch, Passes, PassRequest
from pivotune.kernels.cross_entropy import cross_entropies
from pivotune.lenses.base import Lens
from pivotune.models.architecture import Architecture
from pivotune.models.head import frozen_norm
from pivotune.objectives.base import InnerLoss, LossTerm

# The part of the row that each inner loss supervises: conversion asks for x_en, thinking for y_en.
SIDES = {"conversion": "query", "thinking": "answer"}


class AutoregressiveNLL:
    """The English tokens follow the target prompt; each state predicts the next token."""

    additive = True
    uses_lens = True

    def __init__(self, options: LogitsConfig) -> None:
        self.options = options

    def request(
        self, losses: Sequence[InnerLoss], batch: Batch, architecture: Architecture, reference: nn.Module | None
    ) -> PassRequest:
        """Ask for one English branch a loss, which leaves the forward after the loss's layer."""
        return PassRequest(
            branches={loss.name: (loss.layer, SIDES[loss.name]) for loss in losses},
            detached_branches=self.options.gradient == "prompt",
        )

    def count(self, loss: InnerLoss, batch: Batch) -> Tensor:
        """Count the English tokens of the loss's side."""
        return batch[f"english_{SIDES[loss.name]}_mask"].sum()

    def predictions(
        self, losses: Sequence[InnerLoss], passes: Passes, batch: Batch
    ) -> dict[InnerLoss, tuple[Tensor, Tensor]]:
        """Return raw states (N, width) and the tokens (N,) that they predict; a batch without a branch has no entry."""
        branches = {loss: passes.branches[loss.name] for loss in losses if loss.name in passes.branches}
        return {loss: (branch.hidden_states, branch.labels) for loss, branch in branches.items()}

    def __call__(
        self, losses: Sequence[InnerLoss], passes: Passes, batch: Batch, architecture: Architecture, lens: Lens
    ) -> dict[str, LossTerm]:
        """Return the negative log-likelihoods of the English tokens, with one call of the head for all losses."""
        predictions = {
            loss: (lens(states, loss.layer), labels)
            for loss, (states, labels) in self.predictions(losses, passes, batch).items()
        }
        terms = inner_nll(architecture, predictions, norm=self.options.norm)
        return {loss.name: term for loss, term in terms.items()}


class PositionalNLL(AutoregressiveNLL):
    """The English tokens are labels on the target's own positions, in the same pass."""

    def request(
        self, losses: Sequence[InnerLoss], batch: Batch, architecture: Architecture, reference: nn.Module | None
    ) -> PassRequest:
        """Ask for the main sequence's states after each loss's layer."""
        return PassRequest(main_layers=frozenset(loss.layer for loss in losses))

    def count(self, loss: InnerLoss, batch: Batch) -> Tensor:
        """Count the target positions that get an English label."""
        return positional_targets(batch, SIDES[loss.name])[0].sum()

    def predictions(
        self, losses: Sequence[InnerLoss], passes: Passes, batch: Batch
    ) -> dict[InnerLoss, tuple[Tensor, Tensor]]:
        """Return raw states (N, width) of the main sequence and the English tokens (N,) laid on them."""
        targets = {loss: positional_targets(batch, SIDES[loss.name]) for loss in losses}
        states = passes.main.hidden_states
        return {loss: (states[loss.layer][places], labels) for loss, (places, labels) in targets.items()}


def build_english_nll(options: LogitsConfig) -> AutoregressiveNLL:
    """Return the objective of `signal: logits` for `logits.mode`."""
    return PositionalNLL(options) if options.mode == "positional" else AutoregressiveNLL(options)


def positional_targets(batch: Batch, side: str) -> tuple[Tensor, Tensor]:
    """Return the positions (B, T) bool of the main sequence that get an English label, and the labels (N,), row by row.

    For `query` the state at the t-th query token is asked for the t-th English query token; for `answer` the state that
    predicts the t-th answer token is asked for the t-th English answer token.
    """
    if side == "query":
        places = batch["query_mask"]
    else:
        places = torch.zeros_like(batch["query_mask"])
        places[:, :-1] = batch["labels"][:, 1:] >= 0
    english = batch[f"english_{side}_mask"]
    lengths = torch.minimum(places.sum(dim=1), english.sum(dim=1))[:, None]
    first, english_first = (mask & (mask.cumsum(dim=1) <= lengths) for mask in (places, english))
    return first, batch["english_input_ids"][english_first]


def inner_nll(
    architecture: Architecture, predictions: Mapping[InnerLoss, tuple[Tensor, Tensor]], *, norm: str
) -> dict[InnerLoss, LossTerm]:
    """Return -log P of the English tokens through the frozen head, for all losses in one call of the head.

    Args:
        predictions: loss -> states (N, width) as the lens gives them, and the N tokens they predict.
        norm: `final` recomputes the final norm from these states (frozen), `none` leaves it out.

    Returns:
        loss -> sum of the negative log-likelihoods in nats, and N.
    """
    if not predictions:
        return {}
    states, labels = (torch.cat(parts) for parts in zip(*predictions.values(), strict=True))
    nlls = cross_entropies(architecture, frozen_norm(architecture, states) if norm == "final" else states, labels)
    counts = {loss: labels.numel() for loss, (_, labels) in predictions.items()}
    sums = (part.sum() for part in nlls.split(list(counts.values())))
    return {
        loss: LossTerm(total, torch.tensor(count, device=total.device))
        for (loss, count), total in zip(counts.items(), sums, strict=True)
    }
