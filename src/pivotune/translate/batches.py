"""Batches of similar length for models on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Limits of a batch: characters with padding, and items.
_LIMITS = {"cpu": (4_000, 64), "cuda": (40_000, 512)}


def rows_per_step(device: str) -> int:
    """Return the number of rows between two writes: enough for full batches."""
    return 16 if device == "cpu" else 256


def run_in_batches(
    items: Sequence[Item],
    run: Callable[[Sequence[Item]], Sequence[Result]],
    device: str,
    characters: Callable[[Item], int] = len,
) -> list[Result]:
    """Return the result of each item, in their order; `run` gets one batch after the other, the longest items first."""
    order = sorted(range(len(items)), key=lambda place: characters(items[place]))
    most_characters, most_items = _LIMITS.get(device, _LIMITS["cpu"])
    results: dict[int, Result] = {}
    while order:
        size = max(1, min(most_items, most_characters // max(1, characters(items[order[-1]]))))
        batch = order[-size:]
        del order[-size:]
        results.update(zip(batch, _run_halved([items[place] for place in batch], run), strict=True))
    return [results[place] for place in range(len(items))]


def _run_halved(items: Sequence[Item], run: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result]:
    """Run one batch; a batch that does not fit the GPU's memory is halved."""
    import torch

    try:
        return list(run(items))
    except torch.cuda.OutOfMemoryError:
        if len(items) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(items) // 2
    return _run_halved(items[:half], run) + _run_halved(items[half:], run)
