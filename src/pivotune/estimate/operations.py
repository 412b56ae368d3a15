"""Floating-point operations of a run, and how long a device takes for them.

The formula is that of docs/performance.md, with every row's own lengths, and with attention and adapters in it. d is the
width, V the vocabulary, L the number of blocks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pivotune.config.settings import SupervisionConfig
from pivotune.data.examples import Example
from pivotune.models.architecture import Architecture, find_architecture
from pivotune.objectives.base import InnerLoss
from pivotune.objectives.cosine import english_layer

# Dense bfloat16 products in TFLOP/s as the vendors state them, by part of the device's name.
KNOWN_DEVICES = {
    "B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0,
    "A10": 125.0, "RTX 4090": 165.0, "RTX 3090": 71.0, "MI300X": 1307.0, "MI250X": 383.0,
}  # fmt: skip
# Share of that rate which a training step reaches. On a GPU an assumption (0.3 to 0.5 is usual for models of 1 B parameters
# and more); on a CPU, where the rate is measured with the model's own shapes, what a run reached (docs/scaling.md).
GPU_UTILIZATION = 0.4
CPU_UTILIZATION = {torch.float32: 0.65, torch.bfloat16: 0.65}
_RATE_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What the products of one token cost, in operations, by where they are.

    Attributes:
        block: forward pass of one block.
        backward: of a block's trained part, relative to its forward pass: 2 for trained weights, 1 for frozen ones.
        recomputed: 1 where activation checkpoints run a block's forward pass again, else 0.
        head: forward pass of the head, 2dV.
        head_trained: whether its weight gets a gradient.
        attention: operations for one query and one key, forward and backward, in one block.
        num_layers: L.
    """

    block: float
    backward: float
    recomputed: float
    head: float
    head_trained: bool
    attention: float
    num_layers: int

    @property
    def step(self) -> float:
        """One token through one block, forward and backward."""
        return self.block * (1 + self.recomputed + self.backward)


def measure_costs(model: nn.Module, *, checkpointing: bool, whole_squares: bool) -> Costs:
    """Costs from the shapes of a model on the meta device.

    Args:
        whole_squares: attention multiplies all pairs and computes its weights again in the backward pass, as
            `eager_chunked_attention` does; otherwise half of them, as fused kernels do.
    """
    architecture = find_architecture(model)
    frozen, trained = _matrices(architecture)
    config: Any = getattr(model, "config", None)
    config = config.get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_size
    head = architecture.head_weight
    pair = 14.0 if whole_squares else 7.0
    return Costs(
        block=2.0 * (frozen + trained),
        # Frozen matrices pass the gradient on; trained ones also take their own.
        backward=(frozen + 2.0 * trained) / (frozen + trained),
        recomputed=float(checkpointing),
        head=2.0 * head.numel(),
        head_trained=head.requires_grad,
        attention=(pair + (2.0 + 2.0 * whole_squares if checkpointing else 0.0)) * width,
        num_layers=architecture.num_layers,
    )


def row_operations(example: Example, costs: Costs, supervision: SupervisionConfig, *, separate: bool = False) -> float:
    """Operations of one row, forward and backward.

    Args:
        separate: whether the English branches run their prompt again (`supervision.logits.forward: separate`).
    """
    tokens, answer = len(example.main.ids), example.main.num_answer_tokens
    total = costs.num_layers * (costs.step * tokens + costs.attention * tokens**2)
    total += costs.head * answer * (3 if costs.head_trained else 2)
    if example.parallel is None:
        return total
    query, english = example.main.answer, example.parallel
    lengths = {"conversion": english.num_query_tokens, "thinking": english.num_answer_tokens}
    for name, signal in supervision.active().items():
        if signal.signal == "logits":
            # The head is frozen: its gradient goes to the states alone.
            total += 2 * costs.head * _scored(name, lengths[name], example, supervision)
            if supervision.logits.mode == "autoregressive":
                run = lengths[name] - 1 + (query if separate else 0)
                pairs = run * (run + (0 if separate else 2 * query))
                total += int(signal.layer) * (costs.step * run + costs.attention * pairs)
    return total + _english_pass(example, costs, supervision)


def _scored(name: str, length: int, example: Example, supervision: SupervisionConfig) -> int:
    """English tokens that the head scores: `positional` cuts them to the target's length."""
    if supervision.logits.mode == "autoregressive":
        return length
    main = example.main
    return min(length, main.num_query_tokens if name == "conversion" else main.num_answer_tokens)


def _english_pass(example: Example, costs: Costs, supervision: SupervisionConfig) -> float:
    """The pass over the English row that the feature signal compares with; none where its vectors are kept."""
    layers = [
        english_layer(InnerLoss(name, int(signal.layer)), costs.num_layers)
        for name, signal in supervision.active().items()
        if signal.signal == "feature"
    ]
    if not layers or supervision.feature.english == "frozen" or example.parallel is None:
        return 0.0
    tokens = len(example.parallel.ids)
    joint = supervision.feature.english == "joint"
    share = 1.0 if joint else 2 / 7
    return max(layers) * ((costs.step if joint else costs.block) * tokens + share * costs.attention * tokens**2)


def _matrices(architecture: Architecture) -> tuple[float, float]:
    """Values of a block's frozen and trained matrices, the mean over blocks."""
    counts = {False: 0, True: 0}
    for parameter in architecture.blocks.parameters():
        if parameter.ndim >= 2:
            counts[parameter.requires_grad] += parameter.numel()
    return counts[False] / architecture.num_layers, counts[True] / architecture.num_layers


def known_rate(device_name: str) -> float | None:
    """Operations per second of a known accelerator, or None."""
    for name, teraflops in KNOWN_DEVICES.items():
        if name.lower() in device_name.lower():
            return teraflops * 1e12
    return None


def measured_cpu_rate(shapes: Iterable[tuple[int, int]], tokens: int, dtype: torch.dtype) -> float:
    """Operations per second of this CPU for products of `tokens` rows with matrices of these shapes; the best of five."""
    shapes = list(shapes)
    best = 0.0
    for rows, columns in shapes:
        states, weight = torch.randn(tokens, columns, dtype=dtype), torch.randn(rows, columns, dtype=dtype)
        torch.nn.functional.linear(states, weight)
        seconds = min(_seconds(states, weight) for _ in range(_RATE_ROUNDS))
        best = max(best, 2.0 * tokens * rows * columns / seconds)
    return best


def _seconds(states: torch.Tensor, weight: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.nn.functional.linear(states, weight)
    return time.perf_counter() - started


def seconds_needed(operations: float, rate: float, processes: int) -> float:
    """Seconds for so many operations over `processes` devices of this rate each."""
    return operations / (rate * processes)
