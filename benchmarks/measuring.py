"""Time and memory of contenders that run in turn in one process."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pivotune.errors import UsageError

Contender = Callable[[], Any]

_CLEAR_REFS = Path("/proc/self/clear_refs")


def measure(contenders: Mapping[str, Contender], rounds: int = 5, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every contender in every round, after `warmup` rounds that do not count.

    A round runs each contender once, every second round in reverse order: what slows the machine down for a while
    slows all of them, and none always follows the same neighbour. Garbage is collected outside the measured time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    # What is there before the first round need not be looked through again after each contender.
    gc.collect()
    gc.freeze()
    try:
        for number in range(-warmup, rounds):
            names = list(contenders)
            for name in reversed(names) if number % 2 else names:
                elapsed = _seconds(contenders[name])
                if number >= 0:
                    seconds[name].append(elapsed)
    finally:
        gc.unfreeze()
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> tuple[float, tuple[float, float]]:
    """Median of the ratios of each round, and the smallest and largest of them."""
    ratios = [above / below for above, below in zip(numerator, denominator, strict=True)]
    return statistics.median(ratios), (min(ratios), max(ratios))


def peak_memory(contender: Contender, device: str | torch.device = "cpu") -> int:
    """Bytes above the start that one run of the contender needs at its peak. Run it before: first runs allocate more.

    On CUDA, torch's own count of allocated bytes. On a CPU the kernel's peak of resident memory (`VmHWM`), reset
    through `/proc/self/clear_refs` after the heap's free pages were given back, minus resident memory at the start:
    everything counts, workspaces of libraries too, and repeated runs agree to a few hundred KiB.

    Raises:
        UsageError: on a CPU elsewhere than on Linux.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        contender()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    if not _CLEAR_REFS.exists():
        raise UsageError("memory of a run on --device cpu can be measured on Linux only")
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_REFS.write_text("5")
    start = _status("VmRSS")
    contender()
    return _status("VmHWM") - start


def memory_method(device: str | torch.device) -> str:
    """How `peak_memory` counts on this device, for the result file."""
    if torch.device(device).type == "cuda":
        return "torch.cuda.max_memory_allocated above the start"
    return "VmHWM reset through clear_refs, above VmRSS at the start, after malloc_trim"


def _seconds(contender: Contender) -> float:
    gc.collect()
    _synchronize()
    start = time.perf_counter()
    contender()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _status(field: str) -> int:
    """Bytes that `/proc/self/status` reports."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise UsageError(f"/proc/self/status has no {field}: memory of a run on --device cpu cannot be measured here")
