"""Non-finite losses and gradients: found before the optimizer changes a weight, named by term and rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pivotune.data.formats import row_name
from pivotune.errors import TrainingError
from pivotune.objectives.base import LossTerm

logger = logging.getLogger(__name__)
_ROWS_NAMED = 16


class TrainingDivergedError(TrainingError):
    """A loss or the gradient is not finite; the weights are those of the step before."""


class StepRecord:
    """Losses, terms and row numbers of the micro-batches of one optimizer step. Nothing waits for the device.

    Args:
        sources: the sources of the rows, as in `Rows.sources`.
    """

    def __init__(self, sources: Mapping[str, int] | None = None) -> None:
        self._sources = sources or {}
        self._losses: list[Tensor] = []
        self._terms: list[dict[str, Tensor]] = []
        self._rows: list[Tensor] = []

    def clear(self) -> None:
        """Begin a new optimizer step."""
        for kept in (self._losses, self._terms, self._rows):
            kept.clear()

    def add_terms(self, terms: Mapping[str, LossTerm], batch: Mapping[str, Tensor]) -> None:
        """Add the terms of a micro-batch, and its row numbers if it has them."""
        self._terms.append({name: term.sum.detach() for name, term in terms.items()})
        self._rows.append(batch.get("row_numbers", torch.zeros(0, dtype=torch.long)))

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of the same micro-batch."""
        self._losses.append(loss.detach())

    def bad_losses(self) -> Tensor:
        """Return the number of non-finite losses, a float32 scalar on the device of the losses."""
        return (~torch.isfinite(torch.stack(self._losses))).sum().float()

    def describe(self, step: int, gradient_norm: float, *, in_loss: bool) -> str:
        """Return a line that names the terms and rows. Waits for the device.

        Args:
            step: the optimizer step, from 1.
            gradient_norm: named with all rows of the step if no loss is non-finite.
            in_loss: a loss is non-finite on some rank; the gradient is that of all ranks together.
        """
        bad = [index for index, loss in enumerate(self._losses) if not math.isfinite(loss.item())]
        if bad:
            # The `compute_loss` of a subclass may record no terms.
            terms = [self._terms[index] for index in bad if index < len(self._terms)]
            found = {name: value.item() for each in terms for name, value in each.items()}
            broken = ", ".join(f"{name} {value:g}" for name, value in found.items() if not math.isfinite(value))
            return (
                f"the loss is not a finite number at step {step} ({broken or 'no term by itself'}; {self._name(bad)})"
            )
        if in_loss:
            return f"the loss is not a finite number at step {step} (in rows of another process)"
        rows = self._name(range(len(self._rows)))
        return f"the gradient is not a finite number at step {step} (norm {gradient_norm:g}; {rows})"

    def _name(self, indices: Sequence[int]) -> str:
        numbers = [number for index in indices if index < len(self._rows) for number in self._rows[index].tolist()]
        known = sorted({number for number in numbers if number > 0})
        if not known:
            return "rows without numbers"
        more = f" and {len(known) - _ROWS_NAMED} more" if len(known) > _ROWS_NAMED else ""
        return f"rows {', '.join(str(row_name(number, self._sources)) for number in known[:_ROWS_NAMED])}{more}"


def check_skip(found: str, *, nonfinite: str, skipped: int, limit: int) -> None:
    """Warn that a step is skipped, or stop the training.

    Args:
        found: line of `StepRecord.describe`.
        nonfinite: `stop` or `skip`.
        skipped: steps that the run has skipped before.
        limit: steps that it may skip.

    Raises:
        TrainingDivergedError: steps are not to be skipped, or `limit` steps were.
    """
    if nonfinite == "stop":
        raise TrainingDivergedError(
            f"{found}; the weights are those of the step before; look at these rows, lower training.learning_rate or "
            "the supervision weights, or set faults.nonfinite: skip"
        )
    if skipped >= limit:
        raise TrainingDivergedError(
            f"{found}; {limit} steps were skipped before, the limit of faults.skip_limit; look at these rows, or lower "
            "training.learning_rate or the supervision weights"
        )
    logger.warning("%s: step skipped (%d of at most %d)", found, skipped + 1, limit)
