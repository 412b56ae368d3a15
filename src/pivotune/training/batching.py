"""Which rows meet in a batch: those of similar length, so that little is padding, with all lengths in every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from pivotune.data.collator import ExampleDataset
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.resilience.data_order import DataOrder

# Rows are compared within 50 batches drawn at random: 2 % padding where random batches of 8 have 45 % (docs/method.md).
_BATCHES_COMPARED = 50


def group_by_length(
    dataset: ExampleDataset, args: DeepSupervisionConfig, order: DataOrder, epoch: Callable[[], int]
) -> LengthGroupedSampler:
    """The sampler of `train_sampling_strategy: group_by_length`.

    Lengths are those of the sequences that L_TFT is computed on, so that TFT and deep supervision see the same rows in
    the same order.

    Args:
        order: the shape of a step.
        epoch: see `LengthGroupedSampler`.
    """
    return LengthGroupedSampler(
        dataset.lengths,
        batch_size=order.batch_rows,
        num_batches=order.num_batches,
        seed=args.seed if args.data_seed is None else args.data_seed,
        epoch=epoch,
    )


def longest_first(dataset: ExampleDataset) -> Order:
    """The rows of a dataset by falling length."""
    return Order(_longest_first(np.arange(len(dataset)), dataset.lengths))


class Order(Sampler[int]):
    """The rows in a fixed order."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[int]:
        return map(int, self._rows)


class LengthsOnly(Dataset):
    """A dataset's rows as Transformers' samplers measure them: mappings with one entry as long as the row.

    Args:
        name: of that entry.
    """

    def __init__(self, dataset: ExampleDataset, name: str) -> None:
        self._lengths = dataset.lengths
        self._name = name

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> dict[str, range]:
        return {self._name: range(self._lengths[index])}


class LengthGroupedSampler(Sampler[int]):
    """Order of an epoch in which consecutive batches hold rows of similar length.

    An optimizer step of several micro-batches takes one of each length class, so that it is a fair sample of the rows:
    steps of long rows alone would weigh their tokens less, since every step counts the same. The order is a function of
    lengths, sizes, seed and epoch.

    Args:
        lengths: tokens of every row.
        batch_size: rows of one micro-batch, over all ranks.
        num_batches: micro-batches of one optimizer step.
        seed: of the order.
        epoch: the epoch that begins, 0-based; asked when the sampler is iterated.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        batch_size: int,
        num_batches: int,
        seed: int,
        epoch: Callable[[], int],
    ) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._num_batches = num_batches
        self._seed = seed
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch())
        yield from map(int, length_grouped_order(self._lengths, self._batch_size, self._num_batches, generator))


def length_grouped_order(
    lengths: Sequence[int] | np.ndarray, batch_size: int, num_batches: int, generator: torch.Generator
) -> np.ndarray:
    """A permutation of the rows for `LengthGroupedSampler`, int64 (rows,).

    Rows are drawn into groups of `_BATCHES_COMPARED` batches (or a quarter of the rows, if that is less, so that the rows
    of a batch differ from epoch to epoch). Each group is sorted and cut into batches, and dealt out to its steps. The
    step with the longest row comes first, to show at once whether memory suffices; rows that fill no step come last.
    """
    lengths = np.asarray(lengths)
    step = batch_size * num_batches
    order = torch.randperm(len(lengths), generator=generator).numpy()
    full = len(order) // step * step
    steps_per_group = max(1, min(len(order) // (4 * batch_size), _BATCHES_COMPARED) // num_batches)
    for start in range(0, full, step * steps_per_group):
        group = order[start : min(start + step * steps_per_group, full)]
        group[:] = _deal(_longest_first(group, lengths), batch_size, num_batches, generator)
    steps = order[:full].reshape(-1, step)
    if len(steps):
        longest = lengths[steps].max(axis=1).argmax()
        steps[[0, longest]] = steps[[longest, 0]]
    # Rows that fill no batch come last: with `dataloader_drop_last` other ones are left out in every epoch.
    short = len(order) - len(order) % batch_size
    order[full:short] = _longest_first(order[full:short], lengths)
    return order


def _deal(rows: np.ndarray, batch_size: int, num_batches: int, generator: torch.Generator) -> np.ndarray:
    """Cut sorted rows into batches and give every step one batch of each length class, longest first."""
    classes = rows.reshape(num_batches, -1, batch_size)
    dealt = [batches[torch.randperm(len(batches), generator=generator).numpy()] for batches in classes]
    return np.stack(dealt, axis=1).reshape(-1)


def _longest_first(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Rows of one length stay in their order."""
    return rows[np.argsort(-lengths[rows], kind="stable")]
