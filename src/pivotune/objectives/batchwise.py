"""Losses that compare the pooled states of both languages over all rows of a batch, on all ranks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pivotune.forward.passes import Batch, Passes, PassRequest
from pivotune.models.architecture import Architecture
from pivotune.models.sharding import in_lockstep
from pivotune.objectives.base import InnerLoss, LossTerm, no_loss
from pivotune.objectives.cosine import PooledLoss, compared_rows, pool, span_masks


class BatchwiseLoss(PooledLoss):
    """A loss over the mean states of both languages, each after `layer` blocks, of all rows that the ranks have now.

    Rows of two micro-batches are not compared, so that accumulation changes the loss; the number of ranks does not.

    Args:
        options: with `span` (the pooled tokens) and `english` (`detached` or `joint`: gradient through the English side).
    """

    additive = False

    @abstractmethod
    def row_losses(self, name: str, target: Tensor, english: Tensor, rows: Tensor) -> Tensor:
        """Return the losses (N,) of the rows of all ranks, 0 for those that are False in `rows`.

        Args:
            name: of the loss, `conversion` or `thinking`.
            target, english: pooled states, float32 (N, width); only those of this rank have a gradient.
            rows: True for the rows with both texts, bool (N,).
        """

    def request(
        self, losses: Sequence[InnerLoss], batch: Batch, architecture: Architecture, reference: nn.Module | None
    ) -> PassRequest:
        """Ask for the states of both sides at the same layers."""
        layers = frozenset(loss.layer for loss in losses)
        joint = self.options.english == "joint"
        return PassRequest(main_layers=layers, english_layers=layers, english_gradient=joint)

    def term(self, loss: InnerLoss, passes: Passes, batch: Batch, architecture: Architecture) -> LossTerm:
        if passes.english is None:
            return no_loss(batch)
        target_mask, english_mask = span_masks(batch, self.options.span)
        rows = compared_rows(batch, self.options.span)
        target = pool(passes.main.hidden_states[loss.layer], target_mask, "mean")
        # In distributed training the English pass reads one token where no row has an English side.
        english = pool(passes.english.hidden_states[loss.layer][:, : english_mask.shape[1]], english_mask, "mean")
        (target, english), everywhere, start = of_all_ranks([target, english], rows)
        losses = self.row_losses(loss.name, target, english, everywhere)
        own, total = losses[start : start + len(rows)].sum(), losses.sum()
        # The value of the own rows, and the gradient of all: the ranks' sums add up to both.
        return LossTerm(own.detach() + total - total.detach(), rows.sum())


def of_all_ranks(vectors: Sequence[Tensor], rows: Tensor) -> tuple[list[Tensor], Tensor, int]:
    """Return each of `vectors` (B, width) and `rows` (B,) of all ranks as (N, ...), and the place of this rank's first row.

    Only this rank's vectors keep their gradient. Ranks with fewer rows than others are filled up with False rows.
    """
    if not in_lockstep():
        return list(vectors), rows, 0
    most = torch.tensor(len(rows), device=rows.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    own = dist.get_rank()

    def gathered(tensor: Tensor) -> Tensor:
        padded = F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, int(most) - len(tensor)))
        parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, padded.detach().contiguous())
        return torch.cat([*parts[:own], padded, *parts[own + 1 :]])

    marks = gathered(rows.to(torch.uint8)).bool()
    return [gathered(tensor) for tensor in vectors], marks, own * int(most)
