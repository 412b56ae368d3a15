"""The device that an estimate is for: its kind, memory and speed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from pivotune.estimate.operations import known_rate

_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, kw_only=True)
class Device:
    """`kind` is `cpu` or `cuda`; `memory` in bytes, `rate` in operations per second, None where they are not known."""

    kind: str
    name: str
    memory: float | None
    rate: float | None


def find_device(*, use_cpu: bool = False) -> Device:
    """The device that training would use here."""
    if torch.cuda.is_available() and not use_cpu:
        properties = torch.cuda.get_device_properties(0)
        return Device(
            kind="cuda", name=properties.name, memory=properties.total_memory, rate=known_rate(properties.name)
        )
    return Device(kind="cpu", name=f"CPU, {torch.get_num_threads()} threads", memory=_machine_memory(), rate=None)


def described_device(memory: float | None, teraflops: float | None) -> Device:
    """A GPU that is not here, from the options of the command line."""
    return Device(kind="cuda", name="GPU", memory=memory, rate=None if teraflops is None else teraflops * 1e12)


def _machine_memory() -> float | None:
    """Physical memory, or what a container may use of it."""
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
    limits = [int(text) for text in (_read(path) for path in _CGROUP_LIMITS) if text.isdecimal()]
    return float(min([physical, *limits]))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
