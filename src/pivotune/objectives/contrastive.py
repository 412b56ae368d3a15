"""The contrastive signal: each target text is nearer to its own English parallel than to those of other rows.

InfoNCE over pooled states of one layer (Liu and Niehues, arXiv 2502.14830): s_ij = cos(h(x_i), h(x_en_j)) / temperature,
and the loss of row i is -log softmax_j(s_ij) at j = i.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pivotune.config.supervision import ContrastiveConfig
from pivotune.objectives.batchwise import BatchwiseLoss


class Contrastive(BatchwiseLoss):
    """InfoNCE whose negatives are the other rows of the micro-batch on all ranks, and those before it in its window.

    Rows of earlier micro-batches are negatives without gradient, so that a small micro-batch has enough of them.
    """

    options: ContrastiveConfig

    def __init__(self, options: ContrastiveConfig) -> None:
        super().__init__(options)
        self._earlier: dict[str, tuple[Tensor, Tensor]] = {}

    def start_window(self) -> None:
        """Forget the rows of the accumulation window before."""
        self._earlier.clear()

    def row_losses(self, name: str, target: Tensor, english: Tensor, rows: Tensor) -> Tensor:
        earlier, kept = self._earlier.get(name, (english[:0].detach(), rows[:0]))
        others, marks = torch.cat([english, earlier]), torch.cat([rows, kept])
        self._earlier[name] = others.detach(), marks
        return info_nce(target, others, rows, marks, self.options.temperature)


def info_nce(target: Tensor, english: Tensor, rows: Tensor, others: Tensor, temperature: float) -> Tensor:
    """Return the InfoNCE losses (N,) in nats, 0 for the rows that are False in `rows`.

    Args:
        target: (N, width).
        english: (M, width), M >= N; the first N are the parallels of the targets.
        rows, others: the targets (N,) and the English texts (M,) that count.
    """
    similarity = F.normalize(target, dim=-1) @ F.normalize(english, dim=-1).T / temperature
    own = torch.eye(*similarity.shape, dtype=torch.bool, device=target.device)
    # A row that does not count keeps its own place: without any its gradient would be NaN.
    log_p = similarity.masked_fill(~(others | own), -torch.inf).log_softmax(dim=-1)
    return torch.where(rows, -log_p.diagonal(), 0.0)
