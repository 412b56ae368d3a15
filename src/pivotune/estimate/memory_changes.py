"""Settings that save memory: changes of one configuration in order of benefit, and the message of a run out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from pivotune.config.settings import LoraSettings, RunConfig
from pivotune.errors import TrainingError
from pivotune.training.arguments import DeepSupervisionConfig, optimizer_name
from pivotune.training.distributed.strategies import Strategy, sharding_unsupported_reason, strategy_of

_LEAST_TOKENS, _CHANGES_NAMED = 32, 3
# Wording of torch's CPU allocator, whose error has no class of its own.
_CPU_WORDS = ("defaultcpuallocator", "not enough memory")


@dataclass(frozen=True)
class MemoryChange:
    """One change: `name` of its kind, `text` for the user to copy, and the keys of the run configuration that it sets."""

    name: str
    text: str
    training: dict[str, Any] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)

    def apply(self, config: RunConfig) -> RunConfig:
        return config.model_copy(update={"training": {**config.training, **self.training}, **self.other})


def memory_changes(
    config: RunConfig, args: DeepSupervisionConfig, *, cuda: bool, strategy: Strategy
) -> list[MemoryChange]:
    """Return the changes that this configuration and strategy still allow, the most beneficial first.

    With `cuda` 8-bit optimizers and 4-bit weights are among them.
    """
    changes = []
    size, window = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if size > 1:
        factor = next(number for number in range(2, size + 1) if size % number == 0)
        batch = {"per_device_train_batch_size": size // factor, "gradient_accumulation_steps": window * factor}
        changes.append(MemoryChange("batch", f"{_assignments('training', batch)} (same steps)", training=batch))
    if not args.gradient_checkpointing:
        training = {"gradient_checkpointing": True}
        changes.append(MemoryChange("checkpointing", "training.gradient_checkpointing=true", training=training))
    if config.lora is None:
        # An 8-bit optimizer is of no use for adapters, whose states are small.
        if cuda and optimizer_name(args) in ("adamw_torch", "adamw_torch_fused"):
            text = "training.optim=adamw_8bit (needs bitsandbytes)"
            changes.append(MemoryChange("optimizer", text, training={"optim": "adamw_8bit"}))
        changes.append(MemoryChange("lora", "lora={r: 16}", other={"lora": LoraSettings.model_validate({})}))
    elif cuda and config.quantize is None:
        changes.append(MemoryChange("quantize", "quantize=4bit (needs bitsandbytes)", other={"quantize": "4bit"}))
    data = config.data
    if min(data.max_prompt_tokens, data.max_completion_tokens) >= 2 * _LEAST_TOKENS:
        limits = {name: getattr(data, name) // 2 for name in ("max_prompt_tokens", "max_completion_tokens")}
        other = {"data": data.model_copy(update=limits)}
        changes.append(MemoryChange("tokens", _assignments("data", limits), other=other))

    def possible(change: MemoryChange) -> bool:
        optimizer = change.training.get("optim", "")
        return sharding_unsupported_reason(strategy, quantized="quantize" in change.other, optimizer=optimizer) is None

    return list(filter(possible, changes))


def _assignments(section: str, settings: dict[str, int]) -> str:
    return " with ".join(f"{section}.{key}={value}" for key, value in settings.items())


class MemoryExhaustedError(TrainingError):
    """Out of memory; the message names the phase and the changes that help, `__cause__` is the first error."""


@contextmanager
def explained_out_of_memory(config: RunConfig, args: DeepSupervisionConfig, doing: str) -> Iterator[None]:
    """Turn an out-of-memory error inside into a `MemoryExhaustedError` that names the phase, as in "training"."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        on_cpu = isinstance(error, MemoryError) or any(words in str(error).lower() for words in _CPU_WORDS)
        if not (on_gpu or on_cpu):
            raise
        changes = [change.text for change in memory_changes(config, args, cuda=on_gpu, strategy=strategy_of(args))]
        if doing.startswith("scoring") and args.per_device_eval_batch_size > 1:
            changes.insert(0, f"training.per_device_eval_batch_size={args.per_device_eval_batch_size // 2}")
        if doing.startswith("measuring"):
            changes.insert(0, "naming both layers (supervision.conversion.layer and supervision.thinking.layer)")
        advice = "; or ".join(changes[:_CHANGES_NAMED]) or "a smaller model, or more devices (docs/scaling.md)"
        where = "the GPU's memory" if on_gpu else "the machine's memory"
        message = f"out of memory while {doing}: {where} does not suffice; try {advice}"
        raise MemoryExhaustedError(f"{message} (`pivotune estimate` lists settings that fit)") from error
