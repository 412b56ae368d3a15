"""Losses that are no finite numbers: which terms, in which rows. Nothing here waits for a device before it is asked to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pivotune.objectives.base import LossTerm

_ROWS_NAMED = 16


class StepRecord:
    """The micro-batches of one optimizer step, as far as naming the culprit needs them."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._terms: list[dict[str, Tensor]] = []
        self._rows: list[Tensor] = []

    def clear(self) -> None:
        """A new optimizer step begins."""
        for kept in (self._losses, self._terms, self._rows):
            kept.clear()

    def add_terms(self, terms: Mapping[str, LossTerm], batch: Mapping[str, Tensor]) -> None:
        """One micro-batch: its terms, and the numbers of its rows where it has them."""
        self._terms.append({name: term.sum.detach() for name, term in terms.items()})
        self._rows.append(batch.get("row_numbers", torch.zeros(0, dtype=torch.long)))

    def add_loss(self, loss: Tensor) -> None:
        """The loss of the micro-batch that `add_terms` was told of."""
        self._losses.append(loss.detach())

    def bad_losses(self) -> Tensor:
        """How many losses are not finite: a float32 scalar where the losses are."""
        return (~torch.isfinite(torch.stack(self._losses))).sum().float()

    def describe(self, step: int, gradient_norm: float, *, in_loss: bool) -> str:
        """What is not finite, and the rows it came from. Waits for the device.

        Args:
            step: the optimizer step, from 1.
            gradient_norm: where no loss was found, on whatever rank, it is the gradient: all rows of the step are named.
            in_loss: whether a loss is not finite on some rank; the gradient is of all ranks together.
        """
        bad = [index for index, loss in enumerate(self._losses) if not math.isfinite(loss.item())]
        if bad:
            found = {name: value.item() for index in bad for name, value in self._terms_of(index).items()}
            broken = ", ".join(f"{name} {value:g}" for name, value in found.items() if not math.isfinite(value))
            return (
                f"the loss is not a finite number at step {step} ({broken or 'no term by itself'}; {self._name(bad)})"
            )
        if in_loss:
            return f"the loss is not a finite number at step {step} (in rows of another process)"
        rows = self._name(range(len(self._rows)))
        return f"the gradient is not a finite number at step {step} (norm {gradient_norm:g}; {rows})"

    def _terms_of(self, index: int) -> dict[str, Tensor]:
        return self._terms[index] if index < len(self._terms) else {}

    def _name(self, indices: Sequence[int]) -> str:
        numbers = [number for index in indices if index < len(self._rows) for number in self._rows[index].tolist()]
        known = sorted(number for number in numbers if number > 0)
        if not known:
            return "rows without numbers"
        more = f" and {len(known) - _ROWS_NAMED} more" if len(known) > _ROWS_NAMED else ""
        return f"rows {', '.join(map(str, known[:_ROWS_NAMED]))}{more}"
