"""Where a model is while something is computed with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def placed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on `device` inside; one that is on an accelerator already, such as a quantized one, stays there."""
    own = next(model.parameters()).device
    if own.type != "cpu" or device.type == "cpu":
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(own)
