"""Changes of a configuration that save memory, the most worthwhile first, as settings to copy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pivotune.config.settings import LoraSettings, RunConfig
from pivotune.training.arguments import DeepSupervisionConfig, optimizer_name
from pivotune.training.distributed.strategies import Strategy, why_not_divided

_LEAST_TOKENS = 32


@dataclass(frozen=True)
class MemoryChange:
    """One change: `name` of its kind, `text` as the user would write it, and the keys of the run configuration it sets."""

    name: str
    text: str
    training: dict[str, Any] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)

    def goes_with(self, strategy: Strategy) -> bool:
        """Whether a run that is divided so can be changed so."""
        optimizer = self.training.get("optim", "")
        return why_not_divided(strategy, quantized="quantize" in self.other, optimizer=optimizer) is None

    def apply(self, config: RunConfig) -> RunConfig:
        """The configuration with the change."""
        return config.model_copy(update={"training": {**config.training, **self.training}, **self.other})


def memory_changes(
    config: RunConfig, args: DeepSupervisionConfig, *, cuda: bool, strategy: Strategy
) -> list[MemoryChange]:
    """What this very configuration can still change; nothing that is set already.

    Args:
        cuda: whether the run is on a GPU, where optimizers of 8 bits and 4-bit weights pay.
        strategy: how the run is divided, which rules out some changes.
    """
    changes = [
        _smaller_batch(args),
        _checkpointing(args),
        _eight_bit(config, args) if cuda else None,
        _adapters(config),
        _four_bit(config) if cuda else None,
        _shorter_rows(config),
    ]
    return [change for change in changes if change is not None and change.goes_with(strategy)]


def _smaller_batch(args: DeepSupervisionConfig) -> MemoryChange | None:
    size, window = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if size == 1:
        return None
    factor = next(number for number in range(2, size + 1) if size % number == 0)
    settings = {"per_device_train_batch_size": size // factor, "gradient_accumulation_steps": window * factor}
    text = " with ".join(f"training.{key}={value}" for key, value in settings.items())
    return MemoryChange("batch", f"{text} (same steps)", training=settings)


def _checkpointing(args: DeepSupervisionConfig) -> MemoryChange | None:
    if args.gradient_checkpointing:
        return None
    return MemoryChange(
        "checkpointing", "training.gradient_checkpointing=true", training={"gradient_checkpointing": True}
    )


def _eight_bit(config: RunConfig, args: DeepSupervisionConfig) -> MemoryChange | None:
    """Of no use for adapters, whose states are small."""
    if config.lora is not None or optimizer_name(args) not in ("adamw_torch", "adamw_torch_fused"):
        return None
    return MemoryChange("optimizer", "training.optim=adamw_8bit (needs bitsandbytes)", training={"optim": "adamw_8bit"})


def _adapters(config: RunConfig) -> MemoryChange | None:
    if config.lora is not None:
        return None
    return MemoryChange("lora", "lora={r: 16}", other={"lora": LoraSettings.model_validate({})})


def _four_bit(config: RunConfig) -> MemoryChange | None:
    if config.lora is None or config.quantize is not None:
        return None
    return MemoryChange("quantize", "quantize=4bit (needs bitsandbytes)", other={"quantize": "4bit"})


def _shorter_rows(config: RunConfig) -> MemoryChange | None:
    data = config.data
    if min(data.max_prompt_tokens, data.max_completion_tokens) < 2 * _LEAST_TOKENS:
        return None
    limits = {
        "max_prompt_tokens": data.max_prompt_tokens // 2,
        "max_completion_tokens": data.max_completion_tokens // 2,
    }
    text = " with ".join(f"data.{key}={value}" for key, value in limits.items())
    return MemoryChange("tokens", text, other={"data": data.model_copy(update=limits)})
