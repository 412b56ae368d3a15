"""The forward passes that deep supervision needs, as one function that a faster one can replace.

`separate_passes` is the reference: one pass over the target rows, one truncated pass for each logits branch, one pass
over the English rows for the feature signal. Whatever replaces it returns the same `Passes` and is tested against it.

Every pass goes through the root module's own `forward` (so that wrappers such as DDP or FSDP see it) with
`logits_to_keep=1`: the model projects one position, and the losses project only what they need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pivotune.model.architecture import Architecture, find_architecture
from pivotune.model.taps import Taps, tap, truncated

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class PassRequest:
    """Which states the losses ask for.

    Attributes:
        main_layers: layers k whose `h_k` is wanted on the main sequence.
        branches: name -> (layer, side) of English branches that continue the target prompt, read through the first
            `layer` blocks; side is `query` (x_en) or `answer` (y_en).
        english_layers: layers k whose `h_k` is wanted on the English sequence; empty for no English pass.
        english_gradient: whether gradient flows through the English pass.
        reference: another model that runs the English pass (a frozen copy of the starting model); None for this one.
    """

    main_layers: frozenset[int] = frozenset()
    branches: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    english_layers: frozenset[int] = frozenset()
    english_gradient: bool = False
    reference: nn.Module | None = None


@dataclass(frozen=True, kw_only=True)
class BranchStates:
    """Raw `h_k` (N, width) at the positions that predict the branch's tokens, and those tokens (N,), row by row."""

    hidden_states: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class Passes:
    """States of all passes; `main` and `english` hold (B, T, width) and (B, S, width) as in the batch contract."""

    main: Taps
    branches: dict[str, BranchStates]
    english: Taps | None


def separate_passes(model: nn.Module, batch: Batch, request: PassRequest) -> Passes:
    """Reference implementation: a pass of its own for every branch, stopped after that branch's layer."""
    architecture = find_architecture(model)
    main = _run(model, architecture, batch["input_ids"], batch["attention_mask"], request.main_layers)
    branches = {
        name: _branch_pass(model, architecture, batch, layer, side)
        for name, (layer, side) in request.branches.items()
        if batch[f"english_{side}_mask"].any()
    }
    wants_english = bool(request.english_layers) and bool(batch["english_attention_mask"].any())
    return Passes(main=main, branches=branches, english=_english_pass(model, batch, request) if wants_english else None)


def _run(
    model: nn.Module, architecture: Architecture, input_ids: Tensor, attention_mask: Tensor, layers: frozenset[int]
) -> Taps:
    with tap(architecture, layers) as taps:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
    return taps


def _branch_pass(model: nn.Module, architecture: Architecture, batch: Batch, layer: int, side: str) -> BranchStates:
    """Run [prompt | English tokens] through the first `layer` blocks."""
    input_ids, attention_mask, branch_mask = branch_inputs(batch, side)
    with truncated(architecture, layer):
        taps = _run(model, architecture, input_ids, attention_mask, frozenset({layer}))
    # The token before predicts: the last prompt token predicts the first English one.
    predicting = branch_mask[:, 1:]
    return BranchStates(
        hidden_states=taps.hidden_states[layer][:, :-1][predicting], labels=input_ids[:, 1:][predicting]
    )


def branch_inputs(batch: Batch, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Lay each row's English tokens behind its target prompt.

    Rows without an English side are left out.

    Returns:
        input_ids (R, U), attention_mask (R, U) and branch_mask (R, U) bool, true on the English tokens; padded right.
    """
    keep = batch[f"english_{side}_mask"].any(dim=1)
    prompt_lengths = (batch["attention_mask"].bool() & (batch["labels"] < 0)).sum(dim=1)[keep]
    english_mask = batch[f"english_{side}_mask"][keep]
    english_lengths = english_mask.sum(dim=1)
    totals = prompt_lengths + english_lengths
    positions = torch.arange(int(totals.max()), device=totals.device)[None, :]
    in_prompt = positions < prompt_lengths[:, None]
    in_branch = ~in_prompt & (positions < totals[:, None])
    # Padding repeats a token of the row: any valid id will do behind the attention mask.
    input_ids = batch["input_ids"][keep][:, :1].repeat(1, positions.shape[1])
    # Both masks walk the rows in order and left to right, so the tokens fall into place without a loop.
    source = _first_positions(batch["input_ids"][keep], prompt_lengths)
    input_ids[in_prompt] = batch["input_ids"][keep][source]
    input_ids[in_branch] = batch["english_input_ids"][keep][english_mask]
    return input_ids, (in_prompt | in_branch).long(), in_branch


def _first_positions(tokens: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device)[None, :] < lengths[:, None]


def _english_pass(model: nn.Module, batch: Batch, request: PassRequest) -> Taps:
    """Run the English rows, no further than the highest layer asked for."""
    runner = model if request.reference is None else request.reference
    architecture = find_architecture(runner)
    gradient = request.english_gradient and request.reference is None
    with (
        nullcontext() if gradient else _without_gradient(architecture),
        truncated(architecture, max(request.english_layers)),
    ):
        return _run(
            runner,
            architecture,
            batch["english_input_ids"],
            # A row without an English side would attend to nothing and give NaN; its states are never read.
            batch["english_attention_mask"].masked_fill(~batch["english_attention_mask"].any(dim=1, keepdim=True), 1),
            request.english_layers,
        )


@contextmanager
def _without_gradient(architecture: Architecture) -> Iterator[None]:
    """No gradient, hence nothing to recompute: reentrant checkpoints would warn of inputs without one."""
    checkpointed: list[Any] = [b for b in architecture.blocks if getattr(b, "gradient_checkpointing", False)]
    for block in checkpointed:
        block.gradient_checkpointing = False
    try:
        with torch.no_grad():
            yield
    finally:
        for block in checkpointed:
            block.gradient_checkpointing = True
