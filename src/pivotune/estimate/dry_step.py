"""One training step that allocates nothing: the real losses and backward pass on fake tensors.

The model is cut to two blocks between any two layers that matter (where a branch leaves, where a loss reads), and the
second block's part of the timeline is repeated as often as the whole model has such blocks. Everything else is what
training runs, so that what a family, an attention kernel, activation checkpointing or an adapter keeps is counted and not
guessed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pivotune.config.settings import SupervisionConfig
from pivotune.estimate.allocations import AllocationLog, Timeline
from pivotune.forward.passes import Forward, choose_passes
from pivotune.models.architecture import find_architecture
from pivotune.models.sharding import assumed_device_kind
from pivotune.objectives.base import weighted_total
from pivotune.objectives.deep_supervision import deep_supervision_terms, term_counts

# The first block after a cut differs (branches are cut off before it), the second stands for the rest.
_BLOCKS_KEPT = 2


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What decides a step's memory beside model and batch.

    Attributes:
        device: `cpu` or `cuda`, whose kernels and chunk sizes are used.
        autocast: whether products run in bfloat16.
        checkpointing: whether activations are computed again in the backward pass, block by block.
        accumulated: whether gradients of an earlier micro-batch are there already.
        forward: as `supervision.logits.forward`.
    """

    device: str
    autocast: bool
    checkpointing: bool = False
    accumulated: bool = False
    forward: Forward = "auto"


def dry_step(
    model: nn.Module, batch: Mapping[str, Tensor], supervision: SupervisionConfig, settings: StepSettings
) -> Timeline:
    """The allocations of one micro-batch, forward and backward.

    Args:
        model: on the meta device, with its adapters; it is cut and changed, so build one for every call.
        batch: as `DeepSupervisionCollator` makes it, real tensors on the CPU.
    """
    supervision, times = _cut(model, supervision)
    model = _as_fake(model)
    log = AllocationLog(held=_state(model), weights=model.parameters())
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(assumed_device_kind(settings.device))
        if settings.checkpointing:
            _checkpoint(model)
        if settings.accumulated:
            _give_gradients(model, log)
        stack.enter_context(_parts(model, log))
        stack.enter_context(log)
        _run(model, batch, supervision, settings, log)
    gradients = [] if settings.accumulated else [p.grad for p in model.parameters() if p.grad is not None]
    return log.timeline(gradients, times)


def _run(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    supervision: SupervisionConfig,
    settings: StepSettings,
    log: AllocationLog,
) -> None:
    model.train()
    run_passes = choose_passes(model, settings.forward)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.autocast):
        terms = deep_supervision_terms(model, batch, supervision, run_passes=run_passes)
        loss = weighted_total(terms, dict.fromkeys(terms, 1.0), term_counts(batch, supervision))
    del terms
    log.begin_backward()
    loss.backward()


def _cut(model: nn.Module, supervision: SupervisionConfig) -> tuple[SupervisionConfig, dict[str, int]]:
    """Drop blocks that repeat; returns the inner losses at their new layers, and how often each part comes."""
    architecture = find_architecture(model)
    layers = sorted({int(signal.layer) for signal in supervision.active().values()} - {0, architecture.num_layers})
    borders = [0, *layers, architecture.num_layers]
    kept: list[int] = []
    new_layers = {architecture.num_layers: 0}
    times: dict[str, int] = {}
    for start, stop in pairwise(borders):
        kept += range(start, min(start + _BLOCKS_KEPT, stop))
        new_layers[stop] = len(kept)
        if stop - start > _BLOCKS_KEPT:
            repeats = stop - start - _BLOCKS_KEPT + 1
            times |= {f"{direction} {len(kept) - 1}": repeats for direction in ("forward", "backward")}
    blocks = nn.ModuleList(architecture.blocks[index] for index in kept)
    setattr(architecture.decoder, architecture.blocks_name, blocks)
    terms = {
        name: term.model_copy(update={"layer": new_layers[int(term.layer)]})
        for name, term in supervision.active().items()
    }
    return supervision.model_copy(update=terms), times


def _as_fake(model: nn.Module) -> nn.Module:
    """The same model with fake tensors on the CPU, whose kernels autograd and autocast choose as for real ones."""
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    base.tie_weights()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted[name])
    return model


def _checkpoint(model: Any) -> None:
    # As `Trainer` does, where checkpoints are not reentrant unless asked for; those keep the same tensors.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _give_gradients(model: nn.Module, log: AllocationLog) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
            log.hold(parameter.grad)


def _state(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@contextmanager
def _parts(model: nn.Module, log: AllocationLog) -> Iterator[None]:
    """Tell the log where every block begins, forward and backward."""
    hooks = [hook for index, block in enumerate(find_architecture(model).blocks) for hook in _hooks(index, block, log)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hooks(index: int, block: nn.Module, log: AllocationLog) -> Sequence[Any]:
    def forward(*_: Any) -> None:
        # Checkpoints run blocks again in the backward pass: that belongs to the block's backward part.
        if not log.in_backward:
            log.begin(f"forward {index}")

    def backward(module: nn.Module, args: Any, output: Any) -> None:
        if log.in_backward:
            return
        log.begin("between")
        states = output[0] if isinstance(output, tuple) else output
        if states.requires_grad:
            states.register_hook(lambda gradient: log.begin(f"backward {index}"))

    return block.register_forward_pre_hook(forward), block.register_forward_hook(backward)
