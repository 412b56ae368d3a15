"""Memory, steps and operations of a run, from its configuration, the model's `config.json` and a sample of its rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from pivotune.config.settings import RunConfig
from pivotune.data.collator import DeepSupervisionCollator
from pivotune.data.datasets import spread
from pivotune.data.examples import Pair
from pivotune.estimate.dry_step import dry_step
from pivotune.estimate.memory import Memory, ModelSize, measure_model, memory_of, meta_model, read_model_config
from pivotune.estimate.memory_changes import MemoryChange, memory_changes
from pivotune.estimate.operations import Device, find_device, measure_costs, row_operations
from pivotune.estimate.rows import RunRows, Schedule, largest_batch, num_tokens, rows_of, training_schedule
from pivotune.objectives.cosine import frozen_losses
from pivotune.training.arguments import DeepSupervisionConfig, build_arguments, optimizer_name
from pivotune.training.distributed.strategies import (
    Strategy,
    sharding_unsupported_reason,
    strategy_of,
    whole_weights_reason,
)
from pivotune.training.layer_choice import assumed_supervision
from pivotune.training.phase import check_phase
from pivotune.training.preparation import run_examples

logger = logging.getLogger(__name__)
# Full sharding is tried over up to this many devices.
_MOST_DEVICES = 1024
# Smaller models fit into any memory: not worth the one or two seconds of the dry step when training starts.
_LEAST_PARAMETERS = 20_000_000
# Enough rows to find the longest batch when training starts, in a fraction of a second.
_STARTUP_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Target:
    """Hardware of a run: `device` (`cpu` or `cuda`), and processes with their parallel strategy."""

    device: str
    processes: int = 1
    strategy: Strategy = "single"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Requirements of a run.

    Attributes:
        memory: bytes of one device.
        schedule, operations: rows and steps, floating-point operations of the whole run over all processes; None where the
            number of rows is unknown.
        batch_rows, batch_tokens: size of the largest micro-batch, which `memory` is for.
        autocast: True where matrix products run in bfloat16.
    """

    target: Target
    size: ModelSize
    memory: Memory
    schedule: Schedule | None
    operations: float | None
    batch_rows: int
    batch_tokens: int
    autocast: bool
    rows: RunRows

    def fits(self, memory: float) -> bool:
        """Return True if the peak stays within a device's memory."""
        return self.memory.peak <= memory


def arguments_for(config: RunConfig, device: str) -> DeepSupervisionConfig:
    """Return the trainer's arguments for a kind of device: a GPU computes in bfloat16 unless another dtype is set."""
    training = dict(config.training)
    if device == "cuda":
        training.setdefault("bf16", not (training.get("fp16") or training.get("use_cpu")))
    return build_arguments(config.model_copy(update={"training": training}), here=False)


def why_impossible(config: RunConfig, target: Target) -> str | None:
    """Return the reason why the target's strategy cannot train this run; None if it can."""
    optimizer = optimizer_name(arguments_for(config, target.device))
    return sharding_unsupported_reason(
        target.strategy, quantized=config.quantize is not None, optimizer=optimizer
    ) or whole_weights_reason(target.strategy, ema=config.ema, interpolate=config.interpolate)


def estimate_strategies(config: RunConfig, targets: Sequence[Target], rows: RunRows) -> list[Estimate]:
    """Estimate a run under several strategies on one kind of device. No weight is read or allocated.

    Raises:
        UsageError: a mistake in the configuration, or a phase as long as the run.
    """
    device = targets[0].device
    model_config = read_model_config(config)
    text = model_config.get_text_config()
    args = arguments_for(config, device)
    supervision = assumed_supervision(args, text.num_hidden_layers)
    num_rows = rows.rows or len(rows.examples)
    batch = largest_batch(rows.examples, args, rows=num_rows, processes=targets[0].processes)
    tensors = DeepSupervisionCollator(0)(batch)
    for loss in frozen_losses(supervision):
        tensors[f"english_features_{loss.name}"] = torch.zeros(len(batch), text.hidden_size)
    accumulated, checkpointing = args.gradient_accumulation_steps > 1, bool(args.gradient_checkpointing)
    forward = args.supervision.logits.forward
    options: Any = {"checkpointing": checkpointing, "accumulated": accumulated, "forward": forward}
    cut = meta_model(config, model_config)
    timeline = dry_step(cut, tensors, supervision, device=device, autocast=args.bf16, **options)
    model = meta_model(config, model_config)
    optimizer = optimizer_name(args)
    size = measure_model(model, optimizer=optimizer, quantized=config.quantize is not None)
    if config.ema is not None:
        # The average is kept beside the optimizer's states, in float32.
        size = replace(size, optimizer_bytes=size.optimizer_bytes + 4 * size.trained)
    whole_squares = device == "cpu" and args.bf16
    costs = measure_costs(model, checkpointing=checkpointing, whole_squares=whole_squares)
    separate = forward == "separate"
    of_row = fmean(row_operations(example, costs, supervision, separate=separate) for example in rows.examples)
    # Torch's AdamW works on lists of tensors on a GPU, with a temporary for each, unless it is fused.
    foreach_copies = device == "cuda" and optimizer == "adamw_torch"
    options = {"compute_bytes": 2 if args.bf16 else 4, "accumulated": accumulated, "foreach_copies": foreach_copies}
    estimates = []
    for target in targets:
        schedule = None if rows.rows is None else training_schedule(args, rows.rows, target.processes)
        if schedule is not None:
            check_phase(supervision, schedule.steps)
        memory = memory_of(size, timeline, target.strategy, processes=target.processes, **options)
        estimates.append(
            Estimate(
                target=target,
                size=size,
                memory=memory,
                schedule=schedule,
                operations=None if schedule is None else of_row * schedule.rows_seen,
                batch_rows=len(batch),
                batch_tokens=sum(map(num_tokens, batch)),
                autocast=args.bf16,
                rows=rows,
            )
        )
    return estimates


def fitting_changes(config: RunConfig, target: Target, rows: RunRows, memory: float) -> list[str]:
    """Return changes each of which makes the run fit; where none does, the first combination that does.

    Every change is estimated anew. On a GPU the least number of devices for FSDP2 is among them.
    """

    def fits(changed: RunConfig) -> bool:
        return estimate_strategies(changed, [target], rows)[0].fits(memory)

    alone = []
    for change in _changes(config, target):
        if change.name == "batch":
            # The largest micro-batch that fits, with the accumulation that keeps the step.
            smaller = config
            while batch := next((item for item in _changes(smaller, target) if item.name == "batch"), None):
                smaller = batch.apply(smaller)
                if fits(smaller):
                    alone.append(batch.text)
                    break
        elif fits(change.apply(config)):
            alone.append(change.text)
    if target.device == "cuda" and why_impossible(config, Target(device="cuda", strategy="fsdp2")) is None:
        counts = [target.processes * 2**power for power in range(1, 11)]
        counts = [count for count in counts if count <= _MOST_DEVICES]
        targets = [Target(device="cuda", processes=count, strategy="fsdp2") for count in counts]
        devices = [item.target.processes for item in estimate_strategies(config, targets, rows) if item.fits(memory)]
        alone += [f"fsdp2 over {count} GPUs (configs/accelerate/fsdp2.yaml)" for count in devices[:1]]
    if alone:
        return alone
    used: dict[str, str] = {}
    # A change is offered once, except for the batch and the lengths of rows, which shrink further.
    while changes := sorted(_changes(config, target), key=lambda change: change.name in used):
        config, used[changes[0].name] = changes[0].apply(config), changes[0].text
        if fits(config):
            return [", ".join(used.values())]
    return []


def _changes(config: RunConfig, target: Target) -> list[MemoryChange]:
    args = arguments_for(config, target.device)
    return memory_changes(config, args, cuda=target.device == "cuda", strategy=target.strategy)


@dataclass(frozen=True, kw_only=True)
class Startup:
    """Sizes and steps of a run on the devices that it has; `peak` in bytes, None where it was not estimated."""

    size: ModelSize
    target: Target
    schedule: Schedule
    device: Device
    peak: float | None


def startup_estimate(config: RunConfig, args: DeepSupervisionConfig, train: Sequence[Pair]) -> Startup | None:
    """Return the estimate of a prepared run for `pivotune train`; None where it fails, so that the run never does."""
    if is_deepspeed_zero3_enabled():
        # A model that is built now would be partitioned over the processes.
        return None
    try:
        device = find_device(use_cpu=args.use_cpu)
        target = Target(device=device.kind, processes=args.world_size, strategy=strategy_of(args))
        model = meta_model(config, read_model_config(config))
        size = measure_model(model, optimizer=optimizer_name(args), quantized=config.quantize is not None)
        peak, num_rows = None, len(run_examples(train, args))
        if size.total >= _LEAST_PARAMETERS:
            rows = rows_of(spread(train, _STARTUP_ROWS), args, rows=num_rows)
            peak = estimate_strategies(config, [target], rows)[0].memory.peak
        schedule = training_schedule(args, num_rows, args.world_size)
        return Startup(size=size, target=target, schedule=schedule, device=device, peak=peak)
    except Exception as error:
        logger.debug("no estimate of this run: %s", error)
        return None
