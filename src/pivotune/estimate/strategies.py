"""Memory of one device under each way to divide a run over processes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pivotune.estimate.allocations import Timeline
from pivotune.estimate.model_size import ModelSize
from pivotune.training.distributed.strategies import Strategy

# DeepSpeed's defaults, in values: what it reduces at once, and what ZeRO-3 keeps gathered.
_REDUCED_AT_ONCE, _GATHERED_AT_ONCE = 500_000_000, 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device. The parts need not be there at the same time, so `peak` is less than their sum.

    Attributes:
        weights, gradients, optimizer: this device's share of them.
        activations: the most that one micro-batch keeps and works with, copies of weights for autocast included.
        communication: gathered weights and buffers of the strategy.
        peak: the most that is there at once, in the backward pass or in the optimizer's step.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    communication: float
    peak: float

    def to_dict(self) -> dict[str, Any]:
        return {name: round(value) for name, value in asdict(self).items()}


def memory_of(
    size: ModelSize,
    timeline: Timeline,
    strategy: Strategy,
    *,
    processes: int,
    compute_bytes: int,
    accumulated: bool,
    foreach_copies: bool,
) -> Memory:
    """Memory of one device.

    Args:
        timeline: one micro-batch on one device (`dry_step`); its gradients are of the whole model.
        compute_bytes: of one value in the dtype of the products, 2 under bfloat16.
        accumulated: gradients of an earlier micro-batch are there from the start.
        foreach_copies: the optimizer makes a temporary as large as the trained weights.
    """
    if strategy in ("single", "ddp"):
        return _replicated(size, timeline, accumulated, foreach_copies, buckets=strategy == "ddp")
    share = 1 / processes
    weights, master, communication = _sharded(size, strategy, share, compute_bytes)
    gradient_bytes = size.gradient_bytes if strategy == "fsdp2" else size.trained * compute_bytes
    gradients, optimizer = gradient_bytes * share, size.optimizer_bytes * share + master
    # Weights come in the dtype of the products, so that autocast copies none.
    activations = timeline.peak(gradients=0, weight_casts=0)
    backward = (
        activations + gradients
        if accumulated
        else timeline.peak(gradients=gradients / max(size.gradient_bytes, 1), weight_casts=0)
    )
    step = gradients + (size.trained_bytes * share if foreach_copies else 0)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        communication=communication,
        peak=weights + optimizer + max(backward + communication, step) + _unpacked(size, compute_bytes),
    )


def _replicated(
    size: ModelSize, timeline: Timeline, accumulated: bool, foreach_copies: bool, *, buckets: bool
) -> Memory:
    gradients = size.gradient_bytes
    # DistributedDataParallel copies gradients into buckets, which it sends.
    communication = gradients if buckets else 0.0
    backward = timeline.peak(gradients=0) + gradients if accumulated else timeline.peak()
    step = gradients + (size.trained_bytes if foreach_copies else 0)
    return Memory(
        weights=size.weight_bytes,
        gradients=gradients,
        optimizer=size.optimizer_bytes,
        activations=timeline.peak(gradients=0),
        communication=communication,
        peak=size.weight_bytes + size.optimizer_bytes + communication + max(backward, step) + _unpacked(size, 2),
    )


def _sharded(size: ModelSize, strategy: str, share: float, compute_bytes: int) -> tuple[float, float, float]:
    """Weights, DeepSpeed's float32 masters of them, and communication, in bytes on one device."""
    if strategy == "fsdp2":
        # What lies outside the blocks stays gathered for the whole step, with its gradient at the end; of the blocks the
        # one at work, its gradient, and the next one. Gradients are copied into float32 to be added over ranks.
        gathered = compute_bytes * (size.outside + 2 * size.block)
        gradients = compute_bytes * (size.outside + size.block) + 4 * max(size.outside, size.block)
        return size.weight_bytes * share, 0.0, gathered + gradients * size.trained / size.total
    weights = size.total * compute_bytes if size.largest == 0 else size.weight_bytes
    master = size.trained * 4 * share if compute_bytes < 4 else 0.0
    reduced = min(size.trained, _REDUCED_AT_ONCE) * compute_bytes
    if strategy == "zero2":
        return weights, master, 2 * reduced
    gathered = min(size.total, _GATHERED_AT_ONCE) * compute_bytes
    return weights * share, master, gathered + reduced


def _unpacked(size: ModelSize, compute_bytes: int) -> float:
    """A 4-bit matrix is unpacked for its product."""
    return float(size.largest * compute_bytes)
