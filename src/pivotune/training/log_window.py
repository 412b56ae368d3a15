"""What a log line reports: means of the loss terms and speed, over all steps since the line before and all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pivotune.objectives.base import LossTerm

# Target: the main sequence, which is English for replay rows and SFT. English: the parallel side. Padding: of both.
_TOKENS = ("target", "english", "padding")


class LogWindow:
    """Sums on the device, so that a step waits for nothing; read once per log line.

    Args:
        names: the loss terms, in an order that is the same on all ranks.
        device: where the batches are.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = tuple(names)
        self._device = device
        self.clear()

    @property
    def empty(self) -> bool:
        """Whether nothing has been added since the last `clear`."""
        return self._empty

    def clear(self) -> None:
        self._sums = torch.zeros(len(self._names), device=self._device)
        self._counts = torch.zeros(len(self._names) + len(_TOKENS), dtype=torch.long, device=self._device)
        self._empty = True
        self._started = time.perf_counter()

    def mark(self) -> None:
        """An optimizer step begins, which `rollback` takes back."""
        self._marked = self._sums.clone(), self._counts.clone()

    def rollback(self) -> None:
        """Forget what was added since `mark`."""
        self._sums, self._counts = self._marked

    def state(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON: sums over all ranks, and the seconds they took."""
        return {
            "sums": sum_over_ranks(self._sums.clone()).tolist(),
            "counts": sum_over_ranks(self._counts.clone()).tolist(),
            "empty": self._empty,
            "seconds": 0.0 if self._empty else time.perf_counter() - self._started,
        }

    def restore(self, state: Mapping[str, Any], *, counts: bool = True) -> None:
        """Go on from a `state`.

        Args:
            counts: False on all ranks but one, whose sums are those of all.
        """
        self.clear()
        if counts and len(state["sums"]) == len(self._sums):
            self._sums += torch.tensor(state["sums"], device=self._device)
            self._counts += torch.tensor(state["counts"], device=self._device)
        self._empty, self._started = state["empty"], time.perf_counter() - state["seconds"]

    def start(self) -> None:
        """The clock begins with the first step, not with the line before it: evaluation and saving lie between."""
        if self._empty:
            self._started = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Time that was no training."""
        self._started += seconds

    def add(self, terms: Mapping[str, LossTerm], batch: Mapping[str, Tensor]) -> None:
        """One micro-batch; terms that were left out count as nothing."""
        zero = torch.zeros((), device=self._device)
        found = [terms.get(name, LossTerm(zero, zero)) for name in self._names]
        self._sums += torch.stack([term.sum.detach().float() for term in found])
        self._counts += torch.stack([*(term.count.long() for term in found), *token_counts(batch)])
        self._empty = False

    def metrics(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """`<term>_loss`, `<side>_tokens_per_second` and `padding_share`, over all ranks."""
        sums, counts = sum_over_ranks(self._sums).tolist(), sum_over_ranks(self._counts).tolist()
        # Only now have the steps been done: a device works behind its program.
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        tokens = dict(zip(_TOKENS, counts[len(self._names) :], strict=True))
        return {
            **{f"{name}_loss": mean for name, mean in self._means(sums, counts).items()},
            **{f"{side}_tokens_per_second": count / elapsed for side, count in tokens.items()},
            "padding_share": tokens["padding"] / max(sum(tokens.values()), 1),
        }

    def _means(self, sums: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
        return {name: total / count for name, total, count in zip(self._names, sums, counts, strict=False) if count}


def token_counts(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Target tokens, English tokens and padded places of a batch as it was collated."""
    target, english = batch["attention_mask"], batch["english_attention_mask"]
    tokens = target.sum(), english.sum()
    return *tokens, target.numel() + english.numel() - tokens[0] - tokens[1]
