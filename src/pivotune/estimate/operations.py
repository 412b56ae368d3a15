"""Floating-point operations of a run, and the time a device takes for them.

The formula is that of docs/performance.md, with each row's own lengths, attention and adapters. d is the width, V the
vocabulary, L the number of blocks.
"""

from __future__ import annotations

import os
import timeit
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from pivotune.config.supervision import SupervisionConfig
from pivotune.data.examples import Example
from pivotune.models.architecture import find_architecture
from pivotune.objectives.base import InnerLoss
from pivotune.objectives.cosine import english_layer

# Dense bfloat16 products in TFLOP/s from the vendors' data sheets, by part of the device's name.
KNOWN_DEVICES = {
    "B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0,
    "A10": 125.0, "RTX 4090": 165.0, "RTX 3090": 71.0, "MI300X": 1307.0, "MI250X": 383.0,
}  # fmt: skip
# Share of that rate which a training step reaches. On a GPU an assumption (0.3 to 0.5 is usual for models of 1 B parameters
# and more); on a CPU, where the rate is measured with the model's own shapes, the share of measured runs (docs/scaling.md).
GPU_UTILIZATION, CPU_UTILIZATION = 0.4, 0.65
_RATE_ROUNDS, _RATE_TOKENS = 5, 2048
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Operations of one token.

    Attributes:
        block: forward pass of one block.
        step: forward and backward pass of one block.
        reading_step: the same without the weights' gradients (`logits.gradient: prompt`).
        lens: forward pass of a tuned lens.
        head: forward pass of the head, 2dV.
        head_trained: True where the head's weight gets a gradient.
        attention: operations for one query and one key, forward and backward, in one block.
        num_layers: L.
    """

    block: float
    step: float
    reading_step: float
    lens: float
    head: float
    head_trained: bool
    attention: float
    num_layers: int


def measure_costs(model: nn.Module, *, checkpointing: bool, whole_squares: bool) -> Costs:
    """Return the costs from the shapes of a model on the meta device.

    With `whole_squares` attention multiplies all pairs and recomputes its weights in the backward pass, as
    `eager_chunked_attention` does; otherwise half of the pairs, as fused kernels do.
    """
    architecture = find_architecture(model)
    counts = {False: 0, True: 0}
    for parameter in architecture.blocks.parameters():
        if parameter.ndim >= 2:
            counts[parameter.requires_grad] += parameter.numel()
    frozen, trained = counts[False] / architecture.num_layers, counts[True] / architecture.num_layers
    config = cast(Any, model).config.get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_size
    head = architecture.head_weight
    pair = 14.0 if whole_squares else 7.0
    # Frozen matrices pass the gradient on; trained ones also get their own.
    backward = (frozen + 2.0 * trained) / (frozen + trained)
    block = 2.0 * (frozen + trained)
    return Costs(
        block=block,
        step=block * (1 + checkpointing + backward),
        reading_step=block * (2 + checkpointing),
        lens=2.0 * head.shape[1] ** 2,
        head=2.0 * head.numel(),
        head_trained=head.requires_grad,
        attention=(pair + (2.0 + 2.0 * whole_squares if checkpointing else 0.0)) * width,
        num_layers=architecture.num_layers,
    )


def row_operations(example: Example, costs: Costs, supervision: SupervisionConfig, *, separate: bool = False) -> float:
    """Return the operations of one row; with `separate` the English branches repeat the prompt's forward pass."""
    main, parallel = example.main, example.parallel
    tokens = len(main.ids)
    total = costs.num_layers * (costs.step * tokens + costs.attention * tokens**2)
    total += costs.head * main.num_answer_tokens * (3 if costs.head_trained else 2)
    if parallel is None:
        return total
    query, english_passes = main.answer, []
    lengths = {
        "conversion": (parallel.num_query_tokens, main.num_query_tokens),
        "thinking": (parallel.num_answer_tokens, main.num_answer_tokens),
    }
    for name, signal in supervision.active().items():
        if signal.signal in ("feature", "contrastive", "cka"):
            layer = int(signal.layer)
            if signal.signal == "feature":
                layer = english_layer(InnerLoss(name, layer), costs.num_layers)
            english_passes.append((layer, supervision.options(signal.signal).english))
            continue
        autoregressive = supervision.logits.mode == "autoregressive"
        english, target = lengths[name]
        # `positional` cuts the English tokens to the target's length. The head is frozen: only the states get a gradient.
        predicted = english if autoregressive else min(english, target)
        total += 2 * (costs.head + (supervision.lens == "tuned") * costs.lens) * predicted
        if autoregressive:
            through_model = supervision.lens == "model"
            alone = separate or through_model
            run = english - 1 + (query if alone else 0)
            pairs = run * (run + (0 if alone else 2 * query))
            # The separate reference computes detached weights' gradients with zeros.
            reading = supervision.logits.gradient == "prompt" and not alone
            step = costs.reading_step if reading else costs.step
            total += int(signal.layer) * (step * run + costs.attention * pairs)
            if through_model:
                above = costs.num_layers - int(signal.layer)
                total += above * (costs.reading_step * run + costs.attention * pairs)
    english_passes = [each for each in english_passes if each[1] != "frozen"]
    if english_passes:
        # The forward pass of the English row that pooled signals compare with; frozen features are computed once.
        tokens = len(parallel.ids)
        joint = any(english == "joint" for _, english in english_passes)
        share = 1.0 if joint else 2 / 7
        step = costs.step if joint else costs.block
        total += max(english_passes)[0] * (step * tokens + share * costs.attention * tokens**2)
    return total


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device: `kind` is `cpu` or `cuda`; `memory` in bytes, `rate` in operations per second, None where unknown."""

    kind: str
    name: str
    memory: float | None
    rate: float | None


def find_device(*, use_cpu: bool = False) -> Device:
    """Return the device that training would use here; a CPU with the machine's memory or the limit of the container."""
    if torch.cuda.is_available() and not use_cpu:
        properties = torch.cuda.get_device_properties(0)
        rate = known_rate(properties.name)
        return Device(kind="cuda", name=properties.name, memory=properties.total_memory, rate=rate)
    limits = []
    with suppress(ValueError, OSError, AttributeError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in _CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(path.read_text()))
    memory = float(min(limits)) if limits else None
    return Device(kind="cpu", name=f"CPU, {torch.get_num_threads()} threads", memory=memory, rate=None)


def known_rate(device_name: str) -> float | None:
    """Return the operations per second of a known accelerator, or None."""
    return next((rate * 1e12 for name, rate in KNOWN_DEVICES.items() if name.lower() in device_name.lower()), None)


def training_rate(device: Device, model_config: Any, *, autocast: bool, tokens: int) -> float | None:
    """Return the operations per second that training reaches on one device; None for a GPU of unknown rate.

    A CPU's rate is measured now: the best of five products of up to `tokens` rows with a matrix of the model's widths.
    """
    if device.kind != "cpu":
        return None if device.rate is None else device.rate * GPU_UTILIZATION
    text = model_config.get_text_config()
    inner, width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size, text.hidden_size
    dtype = torch.bfloat16 if autocast else torch.float32
    tokens = min(_RATE_TOKENS, tokens)
    states, weight = torch.randn(tokens, width, dtype=dtype), torch.randn(inner, width, dtype=dtype)
    torch.nn.functional.linear(states, weight)
    seconds = timeit.repeat(lambda: torch.nn.functional.linear(states, weight), number=1, repeat=_RATE_ROUNDS)
    return 2.0 * tokens * inner * width / min(seconds) * CPU_UTILIZATION
