"""How many parameters a run has and trains, and how many bytes weights, gradients and optimizer states take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from pivotune.config.settings import RunConfig
from pivotune.models.adapters import add_adapters, build_lora_config
from pivotune.models.architecture import find_architecture

# NF4 with double quantization (Dettmers et al. 2023, section 3): half a byte, a byte of scale for every 64 values, and four
# for every 256 of those.
FOUR_BIT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Optimizer state in bytes per trained value. Those that keep a projection or factors of it are counted as the optimizer
# that they project, which is more than they take.
_STATE_BYTES = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused"), 8.0),
    **dict.fromkeys(("paged_adamw_32bit", "adamw_anyprecision", "stable_adamw"), 8.0),
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_radam"), 8.0),
    **dict.fromkeys(("galore_adamw", "galore_adamw_layerwise", "apollo_adamw", "apollo_adamw_layerwise"), 8.0),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit", "grokadamw"), 12.0),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_32bit"), 4.0),
    "schedule_free_sgd": 4.0,
    "adamw_torch_8bit": 2 * (1 + 4 / 256),
    "adamw_torch_4bit": 2 * (0.5 + 4 / 128),
    **dict.fromkeys(("sgd", "lomo", "adalomo"), 0.0),
}
# bitsandbytes keeps this many states of one byte and a scale for every 256 values, in float32 for small tensors, and
# Transformers asks it for float32 states of embeddings.
_EIGHT_BIT_STATES = {
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), 2),
    **dict.fromkeys(("galore_adamw_8bit", "galore_adamw_8bit_layerwise"), 2),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), 3),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), 1),
}
_EIGHT_BIT_LEAST = 4096


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Counts are values, not bytes; tied weights count once.

    Attributes:
        total, trained: parameters of the model with its adapters.
        frozen_bytes, trained_bytes: of the weights as they are kept; buffers are among the frozen ones.
        optimizer_bytes: state of the optimizer.
        block: parameters of the largest decoder block.
        outside: parameters outside the blocks (embeddings, final norm, head).
        num_layers: decoder blocks.
        largest: values of the largest quantized matrix, which is unpacked for its product; 0 without quantization.
    """

    total: int
    trained: int
    frozen_bytes: float
    trained_bytes: float
    optimizer_bytes: float
    block: int
    outside: int
    num_layers: int
    largest: int = 0

    @property
    def weight_bytes(self) -> float:
        return self.frozen_bytes + self.trained_bytes

    @property
    def gradient_bytes(self) -> float:
        """Gradients have the dtype of their weights."""
        return self.trained_bytes


def meta_model(config: RunConfig, model_config: object) -> nn.Module:
    """The model of a run with its adapters, on the meta device: shapes and dtypes, no memory."""
    settings = {} if not config.trust_remote_code else {"trust_remote_code": True}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=_dtype(config, model_config), **settings)
        if config.lora is None:
            return model
        return add_adapters(model, build_lora_config(config.lora, model))


def measure_model(model: nn.Module, *, optimizer: str, quantized: bool) -> ModelSize:
    """Sizes of a model as `meta_model` builds it."""
    architecture = find_architecture(model)
    packed = set(map(id, _quantized(architecture.blocks))) if quantized else set()
    frozen = trained = 0.0
    for parameter in model.parameters():
        size = FOUR_BIT_BYTES if id(parameter) in packed else parameter.element_size()
        if parameter.requires_grad:
            trained += parameter.numel() * size
        else:
            frozen += parameter.numel() * size
    total = sum(parameter.numel() for parameter in model.parameters())
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in architecture.blocks]
    return ModelSize(
        total=total,
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        frozen_bytes=frozen + sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        trained_bytes=trained,
        optimizer_bytes=optimizer_bytes(model, optimizer),
        block=max(blocks),
        outside=total - sum(blocks),
        num_layers=len(blocks),
        largest=max((weight.numel() for weight in _quantized(architecture.blocks)), default=0) if quantized else 0,
    )


def optimizer_bytes(model: nn.Module, optimizer: str) -> float:
    """Bytes of the optimizer's states for the trained parameters of a model."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return sum(_state_bytes(parameter, optimizer, id(parameter) in embeddings) for parameter in trained)


def _state_bytes(parameter: nn.Parameter, optimizer: str, embedding: bool) -> float:
    count = parameter.numel()
    if optimizer in ("adafactor", "galore_adafactor", "galore_adafactor_layerwise"):
        # Rows and columns of the second moment (Shazeer and Stern 2018), no first moment.
        *leading, rows, columns = parameter.shape if parameter.ndim >= 2 else (1, count, 0)
        return 4.0 * math.prod(leading) * (rows + columns)
    if optimizer in _EIGHT_BIT_STATES:
        states = _EIGHT_BIT_STATES[optimizer]
        return states * count * (4.0 if embedding or count < _EIGHT_BIT_LEAST else 1 + 4 / 256)
    return count * _STATE_BYTES.get(optimizer, 8.0)


def _quantized(blocks: nn.ModuleList) -> Iterator[Tensor]:
    """Frozen matrices of the linear layers in the blocks; embeddings and head stay as they are."""
    for module in blocks.modules():
        if isinstance(module, (nn.Linear, Conv1D)) and not module.weight.requires_grad:
            yield module.weight


def _dtype(config: RunConfig, model_config: object) -> torch.dtype:
    """As `execute_run` loads the weights."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    stored = getattr(model_config, "dtype", None) or torch.float32
    return torch.float32 if config.lora is None else stored
