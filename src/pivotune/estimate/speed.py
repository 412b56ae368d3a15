"""How many operations a second training reaches on a device."""

from __future__ import annotations

import torch

from pivotune.config.settings import RunConfig
from pivotune.estimate.device import Device
from pivotune.estimate.estimate import Estimate, read_model_config
from pivotune.estimate.operations import CPU_UTILIZATION, GPU_UTILIZATION, measured_cpu_rate

_MOST_TOKENS = 2048


def training_rate(config: RunConfig, estimate: Estimate, device: Device) -> float | None:
    """Operations per second of one device; None for a GPU whose rate is not known.

    A CPU's rate is measured now, with products of the model's own widths.
    """
    if device.kind != "cpu":
        return None if device.rate is None else device.rate * GPU_UTILIZATION
    text = read_model_config(config).get_text_config()
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    dtype = torch.bfloat16 if estimate.autocast else torch.float32
    tokens = min(_MOST_TOKENS, estimate.batch_tokens)
    rate = measured_cpu_rate([(inner, text.hidden_size)], tokens, dtype)
    return rate * CPU_UTILIZATION[dtype]
