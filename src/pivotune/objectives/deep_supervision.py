"""L = L_TFT + w_LC * L_LC + w_ET * L_ET: which passes are needed, the named terms, and how many items each counts.

Paper: arXiv 2503.01275, equation of the total loss, where all weights are 1. Terms are named `tft`, `conversion` and
`thinking` everywhere: in logs, metrics and results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from pivotune.forward.passes import Batch, Passes, PassRequest, RunPasses, choose_passes
from pivotune.kernels.cross_entropy import cross_entropy_sum, shifted
from pivotune.lenses.logit import Norm
from pivotune.models.architecture import Architecture, find_architecture
from pivotune.models.taps import Taps
from pivotune.objectives.base import Term
from pivotune.objectives.feature import Pooling, Span, feature_loss, pooled_feature_loss, span_masks
from pivotune.objectives.logits import inner_losses, positional_predictions, positional_targets

SignalKind = Literal["logits", "feature", "none"]
# Which part of the row each inner loss supervises with logits: conversion asks for x_en, thinking for y_en.
_SIDES = {"conversion": "query", "thinking": "answer"}


@dataclass(frozen=True, kw_only=True)
class Signal:
    """One inner loss: its kind, and the layer k it reads (after k blocks)."""

    kind: SignalKind = "none"
    layer: int = 0


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """The inner losses and their options; defaults as in design.md.

    Attributes:
        conversion, thinking: the two inner losses, L_LC at layer i and L_ET at layer j.
        logits_mode: `autoregressive` (chain rule) or `positional`.
        logits_norm: `final` puts the final norm before the head at inner layers (logit lens), `none` does not.
        pooling, span: of the feature signal.
        english: gradient through the English side of the feature signal: `detached`, `joint`, or the `frozen` starting
            model in its place.
        english_norm: `final` compares with the final-normed top state of the English side, `raw` with h_L.
    """

    conversion: Signal = field(default_factory=Signal)
    thinking: Signal = field(default_factory=Signal)
    logits_mode: Literal["autoregressive", "positional"] = "autoregressive"
    logits_norm: Norm = "final"
    pooling: Pooling = "mean"
    span: Span = "query"
    english: Literal["detached", "joint", "frozen"] = "detached"
    english_norm: Literal["final", "raw"] = "final"

    def active(self) -> dict[str, Signal]:
        """The inner losses that are on, by name."""
        signals = {"conversion": self.conversion, "thinking": self.thinking}
        return {name: signal for name, signal in signals.items() if signal.kind != "none"}


def tft_loss(architecture: Architecture, final_states: Tensor, labels: Tensor) -> Term:
    """L_TFT = -log P(y | x): cross-entropy of the answer at the top, in nats, and its number of tokens.

    Args:
        final_states: output of the final norm, (B, T, width).
        labels: (B, T), -100 outside the answer.
    """
    states, targets = shifted(final_states, labels)
    loss = cross_entropy_sum(architecture, states, targets, frozen_head=False)
    return Term(loss, torch.tensor(targets.numel(), device=targets.device))


def deep_supervision_terms(
    model: nn.Module,
    batch: Batch,
    supervision: Supervision,
    *,
    skip: frozenset[str] = frozenset(),
    reference: nn.Module | None = None,
    run_passes: RunPasses | None = None,
) -> dict[str, Term]:
    """All loss terms of one micro-batch: `tft`, and `conversion` and `thinking` where they are on.

    Args:
        model: causal LM, wrapped or not.
        batch: see `pivotune.data.collator.DeepSupervisionCollator`.
        skip: inner losses left out, with their passes (those whose weight is 0 now).
        reference: the frozen starting model, needed for `english="frozen"` where the batch does not carry its pooled
            vectors (`english_features_<term>`).
        run_passes: how the forward passes are run; None for the fastest way that the model allows
            (`pivotune.forward.passes.choose_passes`).

    Returns:
        name -> (sum, count); a term that has nothing to count in this batch is a zero with count 0.
    """
    architecture = find_architecture(model)
    signals = {name: signal for name, signal in supervision.active().items() if name not in skip}
    run_passes = run_passes or choose_passes(model)
    passes = run_passes(model, batch, _request(architecture, batch, supervision, signals, reference))
    assert passes.main.final is not None
    tft = tft_loss(architecture, passes.main.final, batch["labels"])
    inner = inner_losses(architecture, _predictions(passes, batch, supervision, signals), norm=supervision.logits_norm)
    for name, signal in signals.items():
        if signal.kind == "feature":
            inner[name] = _feature_term(architecture, passes, batch, supervision, name, signal)
    return {"tft": tft, **{name: inner.get(name) or _nothing(batch) for name in signals}}


def term_counts(batch: Batch, supervision: Supervision) -> dict[str, Tensor]:
    """How many items each term of this batch counts, from the masks alone (no forward pass).

    Equal to the counts of `deep_supervision_terms`; summed over an accumulation window and all ranks they are what the
    trainer divides by.
    """
    counts = {"tft": (batch["labels"][:, 1:] >= 0).sum()}
    for name, signal in supervision.active().items():
        if signal.kind == "feature":
            counts[name] = span_masks(batch, supervision.span)[1].any(dim=1).sum()
        elif supervision.logits_mode == "positional":
            counts[name] = positional_targets(batch, _SIDES[name])[0].sum()
        else:
            counts[name] = batch[f"english_{_SIDES[name]}_mask"].sum()
    return counts


def _request(
    architecture: Architecture,
    batch: Batch,
    supervision: Supervision,
    signals: Mapping[str, Signal],
    reference: nn.Module | None,
) -> PassRequest:
    features = {
        name: english_layer(name, signal, architecture.num_layers)
        for name, signal in signals.items()
        if signal.kind == "feature" and _pooled_english(batch, supervision, name) is None
    }
    if supervision.english == "frozen" and reference is None and features:
        raise ValueError(
            "english='frozen' needs the starting model as `reference`, or its vectors in the batch as "
            f"`english_features_{next(iter(features))}`"
        )
    positional = supervision.logits_mode == "positional"
    branches = {
        name: (signal.layer, _SIDES[name])
        for name, signal in signals.items()
        if signal.kind == "logits" and not positional
    }
    return PassRequest(
        main_layers=frozenset(signal.layer for name, signal in signals.items() if name not in branches),
        branches=branches,
        english_layers=frozenset(features.values()),
        english_gradient=supervision.english == "joint",
        reference=reference if supervision.english == "frozen" else None,
    )


def _predictions(
    passes: Passes, batch: Batch, supervision: Supervision, signals: Mapping[str, Signal]
) -> dict[str, tuple[Tensor, Tensor]]:
    """States and the English tokens that they predict, of the inner losses with the logits signal."""
    logits = {name: signal.layer for name, signal in signals.items() if signal.kind == "logits"}
    if supervision.logits_mode == "positional":
        states = passes.main.hidden_states
        return {name: positional_predictions(states[layer], batch, _SIDES[name]) for name, layer in logits.items()}
    branches = {name: passes.branches[name] for name in logits if name in passes.branches}
    return {name: (branch.hidden_states, branch.labels) for name, branch in branches.items()}


def _feature_term(
    architecture: Architecture, passes: Passes, batch: Batch, supervision: Supervision, name: str, signal: Signal
) -> Term:
    target, pooling, span = passes.main.hidden_states[signal.layer], supervision.pooling, supervision.span
    pooled = _pooled_english(batch, supervision, name)
    if pooled is not None:
        return pooled_feature_loss(target, pooled, batch, pooling=pooling, span=span)
    if passes.english is None:
        return _nothing(batch)
    layer = english_layer(name, signal, architecture.num_layers)
    english = english_states(passes.english, supervision, name, layer)
    if supervision.english != "joint":
        english = english.detach()
    return feature_loss(target, english, batch, pooling=pooling, span=span)


def _pooled_english(batch: Batch, supervision: Supervision, name: str) -> Tensor | None:
    """What the starting model's pass would give, where it was computed beforehand."""
    return batch.get(f"english_features_{name}") if supervision.english == "frozen" else None


def english_layer(name: str, signal: Signal, num_layers: int) -> int:
    """The layer of the English side that a feature term compares with: conversion its own, thinking the top."""
    return num_layers if name == "thinking" else signal.layer


def english_states(english: Taps, supervision: Supervision, name: str, layer: int) -> Tensor:
    """The English side's states (B, S, width) for a feature term, `layer` as of `english_layer`."""
    if name == "conversion" or supervision.english_norm == "raw":
        return english.hidden_states[layer]
    assert english.final is not None
    return english.final


def _nothing(batch: Batch) -> Term:
    zero = torch.zeros((), device=batch["labels"].device)
    return Term(zero, zero.long())
