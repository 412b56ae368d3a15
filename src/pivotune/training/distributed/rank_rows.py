"""Which rows each of several processes reads: every row once, and all processes the same number of batches.

Accelerate deals batches out in turn: rank p reads batch p, then batch p + P, of P ranks. `RankOrder` lays the rows out for
that. Where rows are missing at the end it puts `BLANK` in their place, where Accelerate alone would repeat rows from the
beginning: they would count twice, in training and in evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

import numpy as np
from torch.utils.data import Dataset, Sampler

from pivotune.data.collator import ExampleDataset
from pivotune.data.examples import Example, Side

BLANK = -1
_NO_TOKENS = Side(ids=np.zeros(0, dtype=np.int32), query=(0, 0), answer=0, characters=0)


class WithBlankRows(Dataset):
    """A dataset in which index `BLANK` is a row without tokens: it adds nothing to any loss and to no count."""

    def __init__(self, dataset: ExampleDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        return self.dataset[index] if index != BLANK else blank_like(self.dataset[0])


def blank_like(example: Example) -> Example:
    """A row without tokens that collates with `example`."""
    features = example.english_features
    zeros = None if features is None else {name: np.zeros_like(vector) for name, vector in features.items()}
    return replace(example, main=_NO_TOKENS, parallel=None, english_features=zeros)


class RankOrder(Sampler[int]):
    """The rows of a sampler so that P ranks which take batches in turn share out each P batches of it.

    Rows that follow each other go to different ranks: after a sort by length what the ranks run at the same time is of
    similar length, so that none waits for another.

    Args:
        sampler: the order of the rows.
        batch_size: rows of one micro-batch on one rank.
        world_size: P.
        drop_last: leave out rows that do not fill a batch on every rank, in place of blank rows.
        epoch: the epoch that begins, 0-based; told to samplers that want to know (`set_epoch`).
    """

    def __init__(
        self,
        sampler: Sampler[int],
        *,
        batch_size: int,
        world_size: int,
        drop_last: bool = False,
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        self._sampler = sampler
        self._batch_size = batch_size
        self._world_size = world_size
        self._drop_last = drop_last
        self._epoch = epoch

    def __len__(self) -> int:
        together, rows = self._batch_size * self._world_size, len(cast(list, self._sampler))
        return (rows // together if self._drop_last else -(-rows // together)) * together

    def __iter__(self) -> Iterator[int]:
        if hasattr(self._sampler, "set_epoch"):
            cast(Sampler, self._sampler).set_epoch(self._epoch())  # pyright: ignore[reportAttributeAccessIssue]
        together = self._batch_size * self._world_size
        rows: list[int] = []
        for row in self._sampler:
            rows.append(row)
            if len(rows) == together:
                yield from self._dealt(rows)
                rows = []
        if rows and not self._drop_last:
            yield from self._dealt(rows)

    def _dealt(self, rows: list[int]) -> Iterator[int]:
        """One batch for every rank, rank after rank."""
        for rank in range(self._world_size):
            own = rows[rank :: self._world_size]
            yield from own
            yield from [BLANK] * (self._batch_size - len(own))
