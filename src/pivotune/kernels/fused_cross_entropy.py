"""Liger's fused cross-entropy of a trained linear head, where it is installed and fits.

It fuses the softmax, its gradient and the soft-cap into one GPU kernel where `linear_cross_entropy` launches one each. Its
speed beside ours has not been measured by this project: `python -m benchmarks.cross_entropy --device cuda` does that.

Torch's `F.linear_cross_entropy` (2.13) is not used. On a CPU (width 576, V = 49,152, float32, 256 rows a chunk) its time
for a trained head is 0.91 of naive's for 1,024 rows and 1.00 for 300, where ours is 0.87 and 0.92, and 2.2 and 8.8 times
naive's with the chunk it chooses itself; it knows no soft-cap, and its losses of single rows compute the logits twice.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache

import torch
from torch import Tensor

from pivotune.kernels.chunked_linear_head import LinearHead


def fused_loss_fits(states: Tensor, head: LinearHead) -> bool:
    """Whether `fused_cross_entropy_sum` can be used: CUDA, a weight that is trained, one dtype, some rows.

    Not under autocast, where it would cast the weight once for every chunk.
    """
    device_type = states.device.type
    return (
        device_type == "cuda"
        and len(states) > 0
        and torch.is_grad_enabled()
        and head.weight.requires_grad
        and states.dtype == head.weight.dtype != torch.float64
        and not torch.is_autocast_enabled(device_type)
        and _installed()
    )


def fused_cross_entropy_sum(states: Tensor, head: LinearHead, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of all rows, with gradient to the states, the weight and the bias; see `LinearHead`.

    Args:
        states: (N, width).
        labels: token ids, (N,).

    Returns:
        Scalar float32 in nats.
    """
    # Imported by name: it needs Triton and is no dependency.
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    # Sums over chunks in float32, as ours are.
    fused = loss(reduction="sum", softcap=head.softcap, accum_dtype=torch.float32)
    return fused(head.weight, states, labels, head.bias).float()


@cache
def _installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None
