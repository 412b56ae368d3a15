"""The forward passes that deep supervision needs, in two ways that give the same states.

`shared_passes` is the fast one: the target rows and all logits branches go through one forward without padding, in which a
branch reads its prompt's states and leaves after its layer. `separate_passes` is the reference, and the fallback for
models that cannot do that: one pass over the target rows and one truncated pass for each branch. Either runs one more
pass over the English rows for the feature signal.

Every pass goes through the root module's own `forward` (so that wrappers such as DDP or FSDP see it) with
`logits_to_keep=1`: the model projects one position, and the losses project only the positions that they need.

In distributed training (`in_lockstep`) every requested pass runs; one that no row of the batch needs reads one token and
predicts nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pivotune.errors import UsageError
from pivotune.forward.detached import tokens_detached
from pivotune.forward.shared.hooks import longest_packed, packed, packing_unsupported_reason
from pivotune.forward.shared.packing import Branch, Packing, leading, pack, pick
from pivotune.models.architecture import Architecture, find_architecture
from pivotune.models.sharding import in_lockstep
from pivotune.models.taps import Taps, evaluation_mode, tap, truncated

logger = logging.getLogger(__name__)
Batch = Mapping[str, Tensor]
Forward = Literal["auto", "shared", "separate"]


@dataclass(frozen=True, kw_only=True)
class PassRequest:
    """The states that the losses need.

    Attributes:
        main_layers: layers k of the main sequence whose `h_k` is needed.
        branches: name -> (layer, side) of English branches that continue the target prompt, read through the first
            `layer` blocks; side is `query` (x_en) or `answer` (y_en).
        detached_branches: True if branch tokens are computed with detached weights, so that their gradient reaches the
            weights through the keys and values of the prompt alone (`logits.gradient: prompt`).
        branches_to_top: True if branches go on to the last layer, with everything above their own layer detached, and
            their states are `h_L` (`lens: model`).
        english_layers: layers k of the English sequence whose `h_k` is needed; empty for no English pass.
        english_gradient: True if gradient flows through the English pass.
        reference: another model that runs the English pass (a frozen copy of the starting model); None for this one.
    """

    main_layers: frozenset[int] = frozenset()
    branches: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    detached_branches: bool = False
    branches_to_top: bool = False
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


RunPasses = Callable[[nn.Module, Batch, PassRequest], Passes]


def choose_passes(model: nn.Module, forward: Forward = "auto") -> RunPasses:
    """Return `shared_passes` if the model supports it, else `separate_passes` (`auto` logs the reason once).

    Raises:
        UsageError: `shared` is requested and the model does not support it.
    """
    if forward == "separate":
        return separate_passes
    reason = packing_unsupported_reason(model)
    if reason is None and in_lockstep() and longest_packed(model) is not None:
        reason = "its rotary embedding grows with the sequence, and all processes have to run the same passes"
    if reason is None:
        return shared_passes
    if forward == "shared":
        raise UsageError(f"supervision.logits.forward: shared is not possible: {reason}; allowed here: auto, separate")
    _warn_once(reason)
    return separate_passes


@cache
def _warn_once(reason: str) -> None:
    logger.warning("padded passes, one for every branch, which is slower: %s", reason)


# --- the shared pass -----------------------------------------------------------------------------------------------


def shared_passes(model: nn.Module, batch: Batch, request: PassRequest) -> Passes:
    """Run one forward over target rows and branches together, laid out by `pivotune.forward.shared.packing`."""
    architecture = find_architecture(model)
    # Tokens are counted on the CPU, in one piece: every question to a device waits for it.
    counted = {name: tensor.cpu() for name, tensor in batch.items() if not tensor.is_floating_point()}
    packed_branches = {} if request.branches_to_top else request.branches
    wanted = {name: spec for name, spec in packed_branches.items() if counted[f"english_{spec[1]}_mask"].any()}
    _check_branches(architecture, counted, request.branches)
    if in_lockstep():
        counted["attention_mask"] = _at_least_one_token(counted["attention_mask"])
    specs = [_branch(counted, layer, side) for layer, side in wanted.values()]
    packing = pack(counted["input_ids"], counted["attention_mask"], _prompt_lengths(counted) if specs else None, specs)
    longest = longest_packed(model)
    if packing.num_tokens == 0 or (longest is not None and int(packing.position_ids.max()) >= longest):
        return separate_passes(model, batch, request)
    if request.detached_branches and wanted:
        packing = replace(packing, trained=packing.segments[0].stop)
    packing = packing.to(architecture.device)
    layers = request.main_layers | {layer for layer, _ in packed_branches.values()}
    taps = _run_packed(model, architecture, packing, layers)
    branches = _branch_passes(model, architecture, batch, request) if request.branches_to_top else {}
    if in_lockstep():
        # Branches without a token, with a gradient history: all ranks gather the head for the inner losses (ZeRO-3).
        none = torch.zeros(0, dtype=torch.long, device=packing.input_ids.device)
        for name, (layer, _) in packed_branches.items():
            branches[name] = BranchStates(hidden_states=taps.hidden_states[layer][0][none], labels=none)
    for (name, (layer, side)), positions in zip(wanted.items(), packing.predicting, strict=True):
        labels = counted["english_input_ids"][counted[f"english_{side}_mask"]].to(packing.input_ids.device)
        branches[name] = BranchStates(hidden_states=pick(taps.hidden_states[layer][0], positions), labels=labels)
    english = _english_pass(model, counted, request, _run_without_padding)
    return Passes(main=_padded(packing, taps, request.main_layers), branches=branches, english=english)


def _branch(batch: Batch, layer: int, side: str) -> Branch:
    """Return one English side of a batch on the CPU, without each row's last token, which predicts nothing."""
    mask = batch[f"english_{side}_mask"]
    rows = mask.any(dim=1).nonzero()[:, 0]
    lengths = mask[rows].sum(dim=1) - 1
    places = leading(lengths, int(lengths.max()))
    tokens = torch.zeros(places.shape, dtype=torch.long)
    tokens[places] = batch["english_input_ids"][rows][mask[rows] & (mask[rows].cumsum(dim=1) <= lengths[:, None])]
    return Branch(layer=layer, rows=rows, tokens=tokens, lengths=lengths)


def _run_packed(model: nn.Module, architecture: Architecture, packing: Packing, layers: Iterable[int]) -> Taps:
    with packed(model, architecture, packing), tap(architecture, layers) as taps:
        model(input_ids=packing.input_ids, position_ids=packing.position_ids, use_cache=False, logits_to_keep=1)
    return taps


def _run_without_padding(
    model: nn.Module, architecture: Architecture, input_ids: Tensor, attention_mask: Tensor, layers: frozenset[int]
) -> Taps:
    """Same as `_run`, with the padding taken out on the way; tokens and mask on the CPU."""
    packing = pack(input_ids, attention_mask).to(architecture.device)
    return _padded(packing, _run_packed(model, architecture, packing, layers), layers)


def _padded(packing: Packing, taps: Taps, layers: Iterable[int]) -> Taps:
    assert taps.final is not None
    return Taps({layer: packing.padded(taps.hidden_states[layer]) for layer in layers}, packing.padded(taps.final))


# --- separate passes, the reference --------------------------------------------------------------------------------


def separate_passes(model: nn.Module, batch: Batch, request: PassRequest) -> Passes:
    """Run a pass of its own for every branch, stopped after that branch's layer. This is the reference."""
    architecture = find_architecture(model)
    _check_branches(architecture, batch, request.branches)
    main = _run(model, architecture, batch["input_ids"], batch["attention_mask"], request.main_layers)
    branches = _branch_passes(model, architecture, batch, request)
    english = _english_pass(model, batch, request, _run)
    return Passes(main=main, branches=branches, english=english)


def _branch_passes(
    model: nn.Module, architecture: Architecture, batch: Batch, request: PassRequest
) -> dict[str, BranchStates]:
    return {
        name: _branch_pass(model, architecture, batch, request, layer, side)
        for name, (layer, side) in request.branches.items()
        if in_lockstep() or batch[f"english_{side}_mask"].any()
    }


def _run(
    model: nn.Module, architecture: Architecture, input_ids: Tensor, attention_mask: Tensor, layers: frozenset[int]
) -> Taps:
    # A row of padding alone would attend to nothing and give NaN; its states are never read.
    attention_mask = attention_mask.masked_fill(~attention_mask.any(dim=1, keepdim=True), 1)
    with tap(architecture, layers) as taps:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
    return taps


def _branch_pass(
    model: nn.Module, architecture: Architecture, batch: Batch, request: PassRequest, layer: int, side: str
) -> BranchStates:
    """Run [prompt | English tokens] through the first `layer` blocks, or on to the top with all above detached."""
    if batch[f"english_{side}_mask"].any():
        input_ids, attention_mask, branch_mask = branch_inputs(batch, side)
    else:
        input_ids, attention_mask = batch["input_ids"][:1, :1], torch.ones_like(batch["attention_mask"][:1, :1])
        branch_mask = torch.zeros_like(attention_mask, dtype=torch.bool)
    top = architecture.num_layers if request.branches_to_top else layer
    # The token before predicts: the last prompt token predicts the first English one.
    predicting = branch_mask[:, 1:]
    with ExitStack() as stack:
        for index, block in enumerate(architecture.blocks[:top]):
            if index < layer and request.detached_branches:
                stack.enter_context(tokens_detached(block, ~branch_mask, ~branch_mask if index == 0 else None))
            elif index >= layer:
                # Gradient leaves through the tokens that predict or are predicted, down to h_layer.
                passing = F.pad(predicting, (0, 1)) | branch_mask if index == layer else None
                stack.enter_context(tokens_detached(block, torch.zeros_like(branch_mask), passing))
        stack.enter_context(truncated(architecture, top))
        taps = _run(model, architecture, input_ids, attention_mask, frozenset({top}))
    states = taps.hidden_states[top][:, :-1][predicting]
    return BranchStates(hidden_states=states, labels=input_ids[:, 1:][predicting])


def branch_inputs(batch: Batch, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Lay each row's English tokens behind its target prompt; leave out rows without an English side.

    Returns:
        input_ids (R, U), attention_mask (R, U) and branch_mask (R, U) bool, True on the English tokens; padded right.
    """
    keep = batch[f"english_{side}_mask"].any(dim=1)
    prompt_lengths = _prompt_lengths(batch)[keep]
    english_mask = batch[f"english_{side}_mask"][keep]
    english_lengths = english_mask.sum(dim=1)
    totals = prompt_lengths + english_lengths
    positions = torch.arange(int(totals.max()), device=totals.device)[None, :]
    in_prompt = positions < prompt_lengths[:, None]
    in_branch = ~in_prompt & (positions < totals[:, None])
    # Padding repeats a token of the row: any valid id will do behind the attention mask.
    input_ids = batch["input_ids"][keep][:, :1].repeat(1, positions.shape[1])
    # Both masks go through the rows in order and left to right, so the tokens fall into place without a loop.
    source = leading(prompt_lengths, batch["input_ids"].shape[1])
    input_ids[in_prompt] = batch["input_ids"][keep][source]
    input_ids[in_branch] = batch["english_input_ids"][keep][english_mask]
    return input_ids, (in_prompt | in_branch).long(), in_branch


# --- both ways -----------------------------------------------------------------------------------------------------


def _check_branches(architecture: Architecture, batch: Batch, branches: Mapping[str, tuple[int, str]]) -> None:
    """Raise a `ValueError` for a layer that the model does not have, and a row whose branch has no prompt to continue."""
    for name, (layer, side) in branches.items():
        if not 1 <= layer <= architecture.num_layers:
            raise ValueError(f"{name}: layer {layer} is not in 1 to {architecture.num_layers}")
        lost = batch[f"english_{side}_mask"].any(dim=1) & (_prompt_lengths(batch) == 0)
        if lost.any():
            row = int(lost.nonzero()[0, 0])
            raise ValueError(f"{name}: row {row} of the batch has an English {side} and no prompt before its answer")


def _prompt_lengths(batch: Batch) -> Tensor:
    """Return the number of tokens before the answer, (B,)."""
    return (batch["attention_mask"].bool() & (batch["labels"] < 0)).sum(dim=1)


def _at_least_one_token(attention_mask: Tensor) -> Tensor:
    """Return the mask, with one token added to a batch that is all padding; that token's states are not read."""
    if not attention_mask.any():
        attention_mask = attention_mask.clone()
        attention_mask[0, 0] = 1
    return attention_mask


def _english_pass(model: nn.Module, batch: Batch, request: PassRequest, run: Callable[..., Taps]) -> Taps | None:
    """Run the English rows, no further than the highest requested layer; None if nothing is requested of them."""
    if not request.english_layers or not (in_lockstep() or batch["english_attention_mask"].any()):
        return None
    input_ids, attention_mask = batch["english_input_ids"], batch["english_attention_mask"]
    if not attention_mask.any():
        input_ids = batch["input_ids"][:, :1]
        attention_mask = _at_least_one_token(torch.zeros_like(batch["attention_mask"][:, :1]))
    runner = model if request.reference is None else request.reference
    architecture = find_architecture(runner)
    gradient = request.english_gradient and request.reference is None
    context = nullcontext() if gradient else _without_gradient(architecture)
    with context, truncated(architecture, max(request.english_layers)):
        return run(runner, architecture, input_ids, attention_mask, request.english_layers)


@contextmanager
def _without_gradient(architecture: Architecture) -> Iterator[None]:
    """Turn gradient and checkpointing off: reentrant checkpoints would warn about inputs without a gradient."""
    checkpointed: list[Any] = [b for b in architecture.blocks if getattr(b, "gradient_checkpointing", False)]
    for block in checkpointed:
        block.gradient_checkpointing = False
    try:
        with torch.no_grad():
            yield
    finally:
        for block in checkpointed:
            block.gradient_checkpointing = True


# --- the check for a new architecture ------------------------------------------------------------------------------


@torch.no_grad()
def check_shared_passes(model: nn.Module) -> float:
    """Return the largest difference between the states of `shared_passes` and `separate_passes` on rows of 24 tokens.

    If it is at rounding level, `shared_prefix=True` may be set in the `ArchitectureSpec` of a new architecture.
    """
    architecture = find_architecture(model)
    columns = torch.arange(24, device=architecture.device)
    ids = (columns * 7 + 3).remainder(architecture.vocab_size).repeat(2, 1)
    real = columns < torch.tensor([[24], [17]], device=architecture.device)
    batch = {
        "input_ids": ids,
        "attention_mask": real.long(),
        "labels": torch.where(real & (columns >= 11), ids, -100),
        "english_input_ids": ids.flip(1).contiguous(),
        "english_attention_mask": real.long(),
        "english_query_mask": real & (columns < 9),
        "english_answer_mask": real & (columns >= 9),
    }
    top = max(architecture.num_layers - 1, 1)
    branches = {"conversion": (1, "query"), "thinking": (top, "answer")}
    request = PassRequest(main_layers=frozenset({1, top}), branches=branches)
    with evaluation_mode(model):
        shared, separate = (run(model, batch, request) for run in (shared_passes, separate_passes))
    pairs = [
        *((shared.branches[name].hidden_states, separate.branches[name].hidden_states) for name in request.branches),
        *((shared.main.hidden_states[k][real], separate.main.hidden_states[k][real]) for k in request.main_layers),
    ]
    return max((one - other).abs().max().item() for one, other in pairs)
