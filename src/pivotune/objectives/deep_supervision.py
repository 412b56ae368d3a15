"""L = L_TFT + w_LC * L_LC + w_ET * L_ET: the passes, the named terms, and the number of items that each counts.

Paper: arXiv 2503.01275, equation of the total loss, where all weights are 1. Terms are named `tft`, `conversion` and
`thinking` everywhere: in logs, metrics and results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pivotune.config.registry import LENSES, OBJECTIVES
from pivotune.config.supervision import SupervisionConfig
from pivotune.forward.passes import Batch, PassRequest, RunPasses, choose_passes
from pivotune.kernels.cross_entropy import cross_entropy_sum, shifted
from pivotune.lenses.base import Lens
from pivotune.models.architecture import Architecture, find_architecture
from pivotune.objectives.base import InnerLoss, LossTerm, Objective, no_loss
from pivotune.objectives.english_kl import count_kept, english_kl


class DeepSupervisionLoss:
    """The loss terms of a supervision; its objectives and its lens are built once.

    Args:
        supervision: its layers must be numbers.
        lens: the lens of `supervision.lens` for the model; None builds one for each batch.
        reference: the frozen starting model, needed for `english: frozen` where batches do not carry its pooled vectors
            (`english_features_<term>`).
        run_passes: runs the forward passes; None for the fastest way that the model allows
            (`pivotune.forward.passes.choose_passes`).
    """

    def __init__(
        self,
        supervision: SupervisionConfig,
        *,
        lens: Lens | None = None,
        reference: nn.Module | None = None,
        run_passes: RunPasses | None = None,
    ) -> None:
        self._keeps_english = supervision.keep_english.kl > 0
        self.names = ("tft", *supervision.active(), *(["english_kl"] if self._keeps_english else []))
        self.objectives = build_objectives(supervision)
        self._supervision, self._lens, self._reference, self._run_passes = supervision, lens, reference, run_passes

    def terms(self, model: nn.Module, batch: Batch, skip: frozenset[str] = frozenset()) -> dict[str, LossTerm]:
        """Return the terms of one micro-batch; see `deep_supervision_terms`."""
        architecture = find_architecture(model)
        kept = (
            (objective, [loss for loss in losses if loss.name not in skip]) for objective, losses in self.objectives
        )
        groups = [(objective, losses) for objective, losses in kept if losses]
        lens = self._lens or LENSES[self._supervision.lens](architecture)
        requests = [objective.request(losses, batch, architecture, self._reference) for objective, losses in groups]
        request = replace(merge_requests(requests), branches_to_top=getattr(lens, "branches_to_top", False))
        passes = (self._run_passes or choose_passes(model))(model, batch, request)
        assert passes.main.final is not None
        terms = {"tft": next_token_loss(architecture, passes.main.final, batch["labels"])}
        inner: dict[str, LossTerm] = {}
        if self._keeps_english:
            inner["english_kl"] = english_kl(architecture, passes.main.final, batch)
        for objective, losses in groups:
            inner.update(objective(losses, passes, batch, architecture, lens))
        names = [name for name in self.names[1:] if name not in skip]
        return {**terms, **{name: inner.get(name) or no_loss(batch) for name in names}}

    def start_window(self) -> None:
        """Begin an accumulation window: objectives that compare its rows forget those of the window before."""
        for objective, _ in self.objectives:
            getattr(objective, "start_window", lambda: None)()

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return the number of items that each term of a batch counts; see `term_counts`."""
        counts = {"tft": (batch["labels"][:, 1:] >= 0).sum()}
        for objective, losses in self.objectives:
            counts.update({loss.name: objective.count(loss, batch) for loss in losses})
        if self._keeps_english:
            counts["english_kl"] = count_kept(batch)
        return {name: counts[name] for name in self.names}


def next_token_loss(architecture: Architecture, final_states: Tensor, labels: Tensor) -> LossTerm:
    """Return L_TFT = -log P(y | x): the cross-entropy of the answer in nats, summed, and its number of tokens.

    Args:
        final_states: output of the final norm, (B, T, width).
        labels: (B, T), -100 outside the answer.
    """
    states, targets = shifted(final_states, labels)
    loss = cross_entropy_sum(architecture, states, targets, frozen_head=False)
    return LossTerm(loss, torch.tensor(targets.numel(), device=targets.device))


def deep_supervision_terms(
    model: nn.Module,
    batch: Batch,
    supervision: SupervisionConfig,
    *,
    skip: frozenset[str] = frozenset(),
    **options: Any,
) -> dict[str, LossTerm]:
    """Return all loss terms of one micro-batch: `tft`, and `conversion`, `thinking` and `english_kl` where they are on.

    Args:
        model: causal LM, wrapped or not.
        batch: see `pivotune.data.collator.DeepSupervisionCollator`.
        supervision: its layers must be numbers.
        skip: inner losses to leave out with their passes (those whose weight is 0 now).
        options: of `DeepSupervisionLoss`.

    Returns:
        name -> (sum, count); a term that has nothing to count in this batch is a zero with count 0.
    """
    return DeepSupervisionLoss(supervision, **options).terms(model, batch, skip)


def term_counts(batch: Batch, supervision: SupervisionConfig) -> dict[str, Tensor]:
    """Return the number of items that each term of this batch counts, from the masks alone (no forward pass).

    Equal to the counts of `deep_supervision_terms`; the trainer divides by their sum over an accumulation window and all
    ranks.
    """
    return DeepSupervisionLoss(supervision).counts(batch)


def build_objectives(supervision: SupervisionConfig) -> list[tuple[Objective, list[InnerLoss]]]:
    """Return the objectives of the active signals, each with the losses that it computes."""
    by_signal: dict[str, list[InnerLoss]] = {}
    for name, term in supervision.active().items():
        by_signal.setdefault(term.signal, []).append(InnerLoss(name, int(term.layer)))
    return [(OBJECTIVES[signal](supervision.options(signal)), losses) for signal, losses in by_signal.items()]


def merge_requests(requests: Sequence[PassRequest]) -> PassRequest:
    """Return one request for all passes of a step."""
    merged = PassRequest()
    for request in requests:
        merged = replace(
            merged,
            main_layers=merged.main_layers | request.main_layers,
            branches={**merged.branches, **request.branches},
            detached_branches=merged.detached_branches or request.detached_branches,
            english_layers=merged.english_layers | request.english_layers,
            english_gradient=merged.english_gradient or request.english_gradient,
            reference=merged.reference or request.reference,
        )
    return merged
