"""Whether a run fits into a device's memory, and which changes would make it fit."""

from __future__ import annotations

from collections.abc import Iterator

from pivotune.config.settings import RunConfig
from pivotune.estimate.estimate import (
    Estimate,
    RunRows,
    Target,
    arguments_for,
    estimate_run,
    estimate_strategies,
    why_impossible,
)
from pivotune.estimate.memory_changes import MemoryChange, memory_changes

# Devices that full sharding is tried over.
_MOST_DEVICES = 1024


def fits(estimate: Estimate, memory: float) -> bool:
    """Whether the peak stays within a device's memory."""
    return estimate.memory.peak <= memory


def fitting_changes(config: RunConfig, target: Target, rows: RunRows, memory: float) -> list[str]:
    """Changes each of which makes the run fit; where none does, the first row of changes that does together.

    Every one is estimated anew. On a GPU the least number of devices for FSDP2 is among them.
    """
    alone = [change.text for change in _single_changes(config, target, rows, memory)]
    if target.device == "cuda":
        alone += _more_devices(config, target, rows, memory)
    return alone or _together(config, target, rows, memory)


def _single_changes(config: RunConfig, target: Target, rows: RunRows, memory: float) -> Iterator[MemoryChange]:
    for change in _changes(config, target):
        if change.name == "batch":
            smallest = _largest_batch(config, target, rows, memory)
            if smallest is not None:
                yield smallest
        elif fits(estimate_run(change.apply(config), target, rows), memory):
            yield change


def _largest_batch(config: RunConfig, target: Target, rows: RunRows, memory: float) -> MemoryChange | None:
    """The largest micro-batch that fits, with the accumulation that keeps the step."""
    while True:
        change = next((item for item in _changes(config, target) if item.name == "batch"), None)
        if change is None:
            return None
        config = change.apply(config)
        if fits(estimate_run(config, target, rows), memory):
            return change


def _together(config: RunConfig, target: Target, rows: RunRows, memory: float) -> list[str]:
    """Add change after change, each as far as it goes."""
    used: dict[str, str] = {}
    while True:
        # A change that is made is not offered again, but for the batch and the lengths of rows, which shrink on.
        change = next(iter(sorted(_changes(config, target), key=lambda item: item.name in used)), None)
        if change is None:
            return []
        config, used[change.name] = change.apply(config), change.text
        if fits(estimate_run(config, target, rows), memory):
            return [", ".join(used.values())]


def _more_devices(config: RunConfig, target: Target, rows: RunRows, memory: float) -> list[str]:
    targets, count = [], max(2, 2 * target.processes)
    if why_impossible(config, Target(device="cuda", strategy="fsdp2")) is not None:
        return []
    while count <= _MOST_DEVICES:
        targets.append(Target(device="cuda", processes=count, strategy="fsdp2"))
        count *= 2
    for estimate in estimate_strategies(config, targets, rows):
        if fits(estimate, memory):
            return [f"fsdp2 over {estimate.target.processes} GPUs (configs/accelerate/fsdp2.yaml)"]
    return []


def _changes(config: RunConfig, target: Target) -> list[MemoryChange]:
    args = arguments_for(config, target.device)
    return memory_changes(config, args, cuda=target.device == "cuda", strategy=target.strategy)
