"""Which rows meet in a batch: those of similar length, so that little is padding, with all lengths in every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Dataset, Sampler

from pivotune.data.collator import ExampleDataset
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.data_order import DataOrder

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
        [len(example.main.ids) for example in dataset.examples],
        batch_size=order.batch_rows,
        num_batches=order.num_batches,
        seed=args.seed if args.data_seed is None else args.data_seed,
        epoch=epoch,
    )


def longest_first(dataset: ExampleDataset) -> Order:
    """The rows of a dataset by falling length."""
    lengths = [len(example.main.ids) for example in dataset.examples]
    return Order(_longest_first(list(range(len(lengths))), lengths))


class Order(Sampler[int]):
    """The rows in a fixed order."""

    def __init__(self, rows: Sequence[int]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)


class LengthsOnly(Dataset):
    """A dataset's rows as Transformers' samplers measure them: mappings with one entry as long as the row.

    Args:
        name: of that entry.
    """

    def __init__(self, dataset: ExampleDataset, name: str) -> None:
        self._examples = dataset.examples
        self._name = name

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, range]:
        return {self._name: range(len(self._examples[index].main.ids))}


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
        self, lengths: Sequence[int], *, batch_size: int, num_batches: int, seed: int, epoch: Callable[[], int]
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
        yield from length_grouped_order(self._lengths, self._batch_size, self._num_batches, generator)


def length_grouped_order(
    lengths: Sequence[int], batch_size: int, num_batches: int, generator: torch.Generator
) -> list[int]:
    """A permutation of the rows for `LengthGroupedSampler`.

    Rows are drawn into groups of `_BATCHES_COMPARED` batches (or a quarter of the rows, if that is less, so that the rows
    of a batch differ from epoch to epoch). Each group is sorted and cut into batches, and dealt out to its steps. The
    step with the longest row comes first, to show at once whether memory suffices; rows that fill no step come last.
    """
    step = batch_size * num_batches
    order = torch.randperm(len(lengths), generator=generator).tolist()
    full = len(order) // step * step
    steps_per_group = max(1, min(len(order) // (4 * batch_size), _BATCHES_COMPARED) // num_batches)
    steps = [
        dealt
        for start in range(0, full, step * steps_per_group)
        for dealt in _deal(
            _longest_first(order[start : min(start + step * steps_per_group, full)], lengths),
            batch_size,
            num_batches,
            generator,
        )
    ]
    if steps:
        longest = max(range(len(steps)), key=lambda index: max(lengths[row] for row in steps[index]))
        steps[0], steps[longest] = steps[longest], steps[0]
    # Rows that fill no batch come last: with `dataloader_drop_last` other ones are left out in every epoch.
    rest, short = order[full:], len(order) - len(order) % batch_size
    return (
        [row for rows in steps for row in rows] + _longest_first(rest[: short - full], lengths) + rest[short - full :]
    )


def _deal(rows: list[int], batch_size: int, num_batches: int, generator: torch.Generator) -> list[list[int]]:
    """Cut sorted rows into batches and give every step one batch of each length class, longest first."""
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    num_steps = len(batches) // num_batches
    classes = [batches[start : start + num_steps] for start in range(0, len(batches), num_steps)]
    orders = [torch.randperm(num_steps, generator=generator).tolist() for _ in classes]
    return [
        [row for batches, order in zip(classes, orders, strict=True) for row in batches[order[step]]]
        for step in range(num_steps)
    ]


def _longest_first(rows: list[int], lengths: Sequence[int]) -> list[int]:
    return sorted(rows, key=lambda row: lengths[row], reverse=True)
