"""The `cka` signal: the rows of a batch have the same geometry in both languages.

1 - linear CKA of the pooled states of one layer (Kornblith et al., arXiv 1905.00414, equation 4; as a loss in TRepLiNa,
arXiv 2510.06249).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pivotune.objectives.batchwise import BatchwiseLoss


class CenteredKernelAlignment(BatchwiseLoss):
    """1 - CKA over the rows of the micro-batch on all ranks; every row counts it once.

    Of two rows the geometry is always the same: use micro-batches of more than three.
    """

    def row_losses(self, name: str, target: Tensor, english: Tensor, rows: Tensor) -> Tensor:
        return torch.where(rows, 1 - linear_cka(target, english, rows), 0.0)


def linear_cka(one: Tensor, other: Tensor, rows: Tensor) -> Tensor:
    """Return ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F), from 0 to 1, of the centred rows; 1 where fewer than two count.

    Args:
        one, other: X and Y, float32 (N, width).
        rows: the rows that count, bool (N,).
    """
    weights = rows.float()[:, None]
    count = weights.sum().clamp(min=1)

    def gram(vectors: Tensor) -> Tensor:
        # N x N: the batch is far smaller than the width.
        centred = (vectors - (vectors * weights).sum(dim=0) / count) * weights
        return centred @ centred.T

    gram_one, gram_other = gram(one), gram(other)
    # Norms of zeros have no gradient.
    norms = (gram_one.square().sum() * gram_other.square().sum()).clamp(min=1e-30).sqrt()
    return torch.where(rows.sum() > 1, (gram_one * gram_other).sum() / norms, 1.0)
