"""Out of memory, in one line: when it happened, and what to change in this very configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pivotune.config.settings import RunConfig
from pivotune.errors import TrainingError
from pivotune.estimate.memory_changes import memory_changes
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.distributed.strategies import strategy_of

_CHANGES_NAMED = 3
# How torch's allocator of the CPU words it; there is no class for it.
_CPU_WORDS = ("defaultcpuallocator", "not enough memory")


class MemoryExhaustedError(TrainingError):
    """The device's memory did not suffice; the message says when and what to change, `__cause__` is the first error."""


@contextmanager
def explained_out_of_memory(config: RunConfig, args: DeepSupervisionConfig, doing: str) -> Iterator[None]:
    """Turn running out of memory inside into a `MemoryExhaustedError`; anything else passes.

    Args:
        doing: what is going on, for the message: "training".
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryExhaustedError(_message(config, args, doing, on_gpu=_is_on_gpu(error))) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU's or the machine's memory is used up."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _CPU_WORDS)


def _is_on_gpu(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError)


def _message(config: RunConfig, args: DeepSupervisionConfig, doing: str, *, on_gpu: bool) -> str:
    changes = [change.text for change in memory_changes(config, args, cuda=on_gpu, strategy=strategy_of(args))][
        :_CHANGES_NAMED
    ]
    if doing.startswith("scoring") and args.per_device_eval_batch_size > 1:
        smaller = max(1, args.per_device_eval_batch_size // 2)
        changes = [f"training.per_device_eval_batch_size={smaller}", *changes][:_CHANGES_NAMED]
    if doing.startswith("measuring"):
        changes = ["naming both layers (supervision.conversion.layer and supervision.thinking.layer)", *changes]
        changes = changes[:_CHANGES_NAMED]
    advice = "; or ".join(changes) or "a smaller model, or more devices (docs/scaling.md)"
    where = "the GPU's memory" if on_gpu else "the machine's memory"
    return f"out of memory while {doing}: {where} does not suffice; try {advice} (`pivotune estimate` says what fits)"
