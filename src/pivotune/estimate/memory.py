"""Memory of one device: sizes of weights, gradients and optimizer states, and the peak under each parallel strategy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from pivotune.config.settings import RunConfig
from pivotune.estimate.dry_step import Timeline
from pivotune.models.adapters import add_adapters, build_lora_config
from pivotune.models.architecture import check_architecture, find_architecture
from pivotune.models.loading import read_config
from pivotune.training.distributed.strategies import Strategy

# NF4 with double quantization (Dettmers et al. 2023, section 3): half a byte, a byte of scale for every 64 values, and four
# for every 256 of those.
FOUR_BIT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Optimizer state in bytes per trained value, where it is not Adam's two float32 moments. Optimizers with a projection or
# factors of the moments (GaLore, APOLLO) count as the optimizer that they project, which is more than they take.
_ADAM_STATE_BYTES = 8.0
_STATE_BYTES = {
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit", "grokadamw"), 12.0),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_32bit"), 4.0),
    "schedule_free_sgd": 4.0,
    "adamw_torch_8bit": 2 * (1 + 4 / 256),
    "adamw_torch_4bit": 2 * (0.5 + 4 / 128),
    **dict.fromkeys(("sgd", "lomo", "adalomo"), 0.0),
}
# bitsandbytes keeps this many states of one byte and a scale for every 256 values, in float32 for small tensors;
# Transformers requests float32 states of embeddings.
_EIGHT_BIT_STATES = {
    "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "galore_adamw_8bit": 2, "galore_adamw_8bit_layerwise": 2,
    "ademamix_8bit": 3, "paged_ademamix_8bit": 3, "lion_8bit": 1, "paged_lion_8bit": 1, "rmsprop_bnb_8bit": 1,
}  # fmt: skip
_EIGHT_BIT_LEAST = 4096
# DeepSpeed's defaults, in values: the reduce bucket, and the limit of gathered weights under ZeRO-3.
_REDUCE_BUCKET, _GATHERED_LIMIT = 500_000_000, 1_000_000_000


def read_model_config(config: RunConfig) -> Any:
    """Read the model's configuration; a folder with nothing but a `config.json` is enough.

    Raises:
        UsageError: a missing model, or an unsupported family.
    """
    folder = Path(config.model).expanduser()
    if (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")):
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    else:
        model_config = read_config(config.model, trust_remote_code=config.trust_remote_code, revision=config.revision)
    check_architecture(model_config.model_type)
    return model_config


def meta_model(config: RunConfig, model_config: Any) -> nn.Module:
    """Build the model of a run with its adapters on the meta device: shapes and dtypes, no memory."""
    # As `execute_run` loads the weights: float32 unless they are frozen under adapters.
    stored = (config.lora and getattr(model_config, "dtype", None)) or torch.float32
    dtype = stored if config.dtype == "auto" else getattr(torch, config.dtype)
    settings = {"trust_remote_code": True} if config.trust_remote_code else {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, **settings)
        return model if config.lora is None else add_adapters(model, build_lora_config(config.lora, model))


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Parameter counts (values, tied weights once) and bytes of a model with its adapters.

    Attributes:
        frozen_bytes, trained_bytes: of the stored weights; buffers are among the frozen ones.
        block: parameters of the largest decoder block.
        outside: parameters outside the blocks (embeddings, final norm, head).
        largest: values of the largest quantized matrix, which is dequantized for its product; 0 without quantization.
    """

    total: int
    trained: int
    frozen_bytes: float
    trained_bytes: float
    optimizer_bytes: float
    block: int
    outside: int
    largest: int = 0

    @property
    def weight_bytes(self) -> float:
        return self.frozen_bytes + self.trained_bytes


def measure_model(model: nn.Module, *, optimizer: str, quantized: bool) -> ModelSize:
    """Return the sizes of a model as `meta_model` builds it."""
    architecture = find_architecture(model)
    # The frozen matrices of the linear layers in the blocks; embeddings and head are not quantized.
    linear = [module for module in architecture.blocks.modules() if isinstance(module, (nn.Linear, Conv1D))]
    frozen = [module.weight for module in linear if quantized and not module.weight.requires_grad]
    packed = {id(weight): weight.numel() for weight in frozen}
    total = trained = 0
    bytes_of = {True: 0.0, False: 0.0}
    for parameter in model.parameters():
        count = parameter.numel()
        total += count
        trained += count if parameter.requires_grad else 0
        size = FOUR_BIT_BYTES if id(parameter) in packed else parameter.element_size()
        bytes_of[parameter.requires_grad] += count * size
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in architecture.blocks]
    return ModelSize(
        total=total,
        trained=trained,
        frozen_bytes=bytes_of[False] + sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        trained_bytes=bytes_of[True],
        optimizer_bytes=optimizer_bytes(model, optimizer),
        block=max(blocks),
        outside=total - sum(blocks),
        largest=max(packed.values(), default=0),
    )


def optimizer_bytes(model: nn.Module, optimizer: str) -> float:
    """Return the bytes of the optimizer's states for the trained parameters of a model."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    total = 0.0
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        count = parameter.numel()
        if optimizer in ("adafactor", "galore_adafactor", "galore_adafactor_layerwise"):
            # Rows and columns of the second moment (Shazeer and Stern 2018), no first moment.
            *leading, rows, columns = parameter.shape if parameter.ndim >= 2 else (1, count, 0)
            total += 4.0 * math.prod(leading) * (rows + columns)
        elif optimizer in _EIGHT_BIT_STATES:
            in_float32 = id(parameter) in embeddings or count < _EIGHT_BIT_LEAST
            total += _EIGHT_BIT_STATES[optimizer] * count * (4.0 if in_float32 else 1 + 4 / 256)
        else:
            total += count * _STATE_BYTES.get(optimizer, _ADAM_STATE_BYTES)
    return total


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device. Not all parts are alive at the same time, so `peak` is less than their sum.

    `activations` is the peak of one micro-batch with autocast's weight copies, `communication` the strategy's gathered
    weights and buffers, `peak` the peak of the whole step, in the backward pass or in the optimizer's step.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    communication: float
    peak: float


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
    """Return the memory of one device.

    Args:
        timeline: one micro-batch on one device (`dry_step`), with the gradients of the whole model.
        compute_bytes: bytes of a value in the dtype of the matrix products, 2 under bfloat16.
        accumulated: gradients of an earlier micro-batch exist from the start.
        foreach_copies: the optimizer makes a temporary as large as the trained weights.
    """
    if strategy in ("single", "ddp"):
        # Gradients have the dtype of their weights.
        weights, gradients, optimizer = size.weight_bytes, size.trained_bytes, size.optimizer_bytes
        # DistributedDataParallel copies gradients into buckets, which it sends.
        communication = gradients if strategy == "ddp" else 0.0
        activations = timeline.peak(gradients=0)
        backward = communication + (activations + gradients if accumulated else timeline.peak())
        step = communication + gradients + (size.trained_bytes if foreach_copies else 0)
        dequantized = 2.0 * size.largest
    else:
        share = 1 / processes
        weights, master, communication = _sharded(size, strategy, share, compute_bytes)
        gradient_bytes = size.trained_bytes if strategy == "fsdp2" else size.trained * compute_bytes
        gradients, optimizer = gradient_bytes * share, size.optimizer_bytes * share + master
        # Weights are gathered in the dtype of the matrix products, so that autocast copies none.
        activations = timeline.peak(gradients=0, weight_casts=0)
        if accumulated:
            backward = communication + activations + gradients
        else:
            kept = gradients / max(size.trained_bytes, 1)
            backward = communication + timeline.peak(gradients=kept, weight_casts=0)
        step = gradients + (size.trained_bytes * share if foreach_copies else 0)
        dequantized = float(size.largest * compute_bytes)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        communication=communication,
        peak=weights + optimizer + max(backward, step) + dequantized,
    )


def _sharded(size: ModelSize, strategy: str, share: float, compute_bytes: int) -> tuple[float, float, float]:
    """Return weights, DeepSpeed's float32 masters of them, and communication, in bytes on one device."""
    if strategy == "fsdp2":
        # Gathered are the parameters outside the blocks for the whole step, with their gradient at the end, and of the
        # blocks the current one, its gradient, and the next one. Gradients are reduced in float32.
        gathered = compute_bytes * (size.outside + 2 * size.block)
        gradients = compute_bytes * (size.outside + size.block) + 4 * max(size.outside, size.block)
        return size.weight_bytes * share, 0.0, gathered + gradients * size.trained / size.total
    weights = size.total * compute_bytes if size.largest == 0 else size.weight_bytes
    master = size.trained * 4 * share if compute_bytes < 4 else 0.0
    reduced = min(size.trained, _REDUCE_BUCKET) * compute_bytes
    if strategy == "zero2":
        return weights, master, 2 * reduced
    gathered = min(size.total, _GATHERED_LIMIT) * compute_bytes
    return weights * share, master, gathered + reduced
