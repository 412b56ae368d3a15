"""Batches: the order of the rows in an epoch, the rows of each rank, and the data loaders.

The order is a function of lengths, step shape, seed and epoch. The step shape is kept in every checkpoint
(`data_order.json`), so that a resumed run reads the same rows in the same order on another number of processes: 2
processes x 1 batch of 4 rows and 1 process x 2 batches of 4 rows are steps of the same 8 rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler
from transformers.trainer_utils import seed_worker

from pivotune.config.training_fields import IN_CHECKPOINTS
from pivotune.data.collator import DeepSupervisionCollator, ExampleDataset
from pivotune.data.examples import Example, Side
from pivotune.errors import UsageError
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.resilience.preemption import ignore_signals_in_workers

# Rows are compared within 50 batches drawn at random: 2 % padding where random batches of 8 have 45 % (docs/method.md).
_BATCHES_COMPARED = 50
DATA_ORDER_FILE = "data_order.json"
_SAME = ("train_sampling_strategy", "data_seed", "dataloader_drop_last")
BLANK = -1
_NO_TOKENS = Side(ids=np.zeros(0, dtype=np.int32), query=(0, 0), answer=0, characters=0)

# ---- the shape of a step ----


@dataclass(frozen=True, kw_only=True)
class DataOrder:
    """Shape of an optimizer step, and the arguments that decide the order of the rows.

    Attributes:
        batch_rows: rows of one micro-batch, over all processes.
        num_batches: micro-batches of a step.
        num_processes: processes that share a micro-batch; the order does not depend on it.
        train_sampling_strategy, data_seed, dataloader_drop_last: arguments that a resumed run must repeat; None in
            checkpoints of earlier versions.
        in_checkpoint: the same for the arguments that optimizer, schedule and best metric keep in their states.
    """

    batch_rows: int
    num_batches: int
    num_processes: int
    train_sampling_strategy: str | None = None
    data_seed: int | None = None
    dataloader_drop_last: bool | None = None
    in_checkpoint: dict[str, Any] | None = None

    @property
    def step_rows(self) -> int:
        """Rows of one optimizer step."""
        return self.batch_rows * self.num_batches

    def __str__(self) -> str:
        own = self.batch_rows // self.num_processes
        return f"{self.step_rows} rows a step ({own} x {self.num_batches} accumulated x {self.num_processes} processes)"


def order_of(args: DeepSupervisionConfig, batch_size: int) -> DataOrder:
    """Return the order of a new run; `batch_size` is that of one process."""
    return DataOrder(
        batch_rows=batch_size * args.world_size,
        num_batches=args.gradient_accumulation_steps,
        num_processes=args.world_size,
        train_sampling_strategy=args.train_sampling_strategy,
        data_seed=args.data_seed,
        dataloader_drop_last=args.dataloader_drop_last,
        # As JSON gives them back.
        in_checkpoint=json.loads(json.dumps({name: getattr(args, name) for name in IN_CHECKPOINTS})),
    )


def save_order(order: DataOrder, checkpoint: Path) -> None:
    """Write `data_order.json` into a checkpoint."""
    (checkpoint / DATA_ORDER_FILE).write_text(json.dumps(asdict(order)) + "\n", encoding="utf-8")


def resumed_order(checkpoint: Path, now: DataOrder) -> DataOrder:
    """Return the order that the checkpoint's run was begun with, after checking that its steps fit `now`.

    Raises:
        UsageError: the steps would hold other rows, or an epoch would have another number of steps; names the setting
            that keeps them.
    """
    path = checkpoint / DATA_ORDER_FILE
    if not path.is_file():
        return now
    try:
        before = DataOrder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path}: cannot be read ({' '.join(str(error).split())}); resume from another one") from error
    if before.step_rows != now.step_rows:
        accumulated, rest = divmod(before.step_rows, now.batch_rows)
        remedy = "choose per_device_train_batch_size and gradient_accumulation_steps for the same number"
        if accumulated and not rest:
            remedy = f"set training.gradient_accumulation_steps={accumulated}"
        raise UsageError(f"{checkpoint} has {before} and this run {now}; {remedy}")
    absent = [name for name in (*_SAME, "in_checkpoint") if getattr(before, name) is None]
    before = replace(before, **{name: getattr(now, name) for name in absent})
    kept, given = (
        {**{name: getattr(each, name) for name in _SAME}, **(each.in_checkpoint or {})} for each in (before, now)
    )
    for name, current in given.items():
        then = kept.get(name, current)
        if then is None and name in ("metric_for_best_model", "greater_is_better"):
            # No best checkpoint was looked for: that may begin now.
            continue
        if then != current:
            raise UsageError(
                f"{checkpoint} was begun with {name} {then} and this run has {current}; set training.{name}={then}"
            )
    if now.dataloader_drop_last and before.batch_rows != now.batch_rows:
        raise UsageError(
            f"{checkpoint} has {before} and this run {now}: dataloader_drop_last would leave out other rows; "
            f"keep per_device_train_batch_size x processes at {before.batch_rows}"
        )
    return before


# ---- the order of the rows ----


def train_sampler(
    dataset: ExampleDataset, args: DeepSupervisionConfig, order: DataOrder, epoch: Callable[[], int]
) -> Sampler:
    """Return the sampler of `train_sampling_strategy`.

    Lengths are those of the sequences that L_TFT is computed on, so that TFT and deep supervision read the same rows in
    the same order.

    Args:
        epoch: see `LengthGroupedSampler`.

    Raises:
        UsageError: `batch_rebalance` with several processes: it gives ranks batches of different sizes.
    """
    if args.train_sampling_strategy == "group_by_length":
        return LengthGroupedSampler(
            dataset.lengths,
            batch_size=order.batch_rows,
            num_batches=order.num_batches,
            seed=args.seed if args.data_seed is None else args.data_seed,
            epoch=epoch,
        )
    if args.train_sampling_strategy == "batch_rebalance":
        from transformers.trainer_pt_utils import BatchRebalanceSampler

        if args.world_size > 1:
            raise UsageError("training.train_sampling_strategy: batch_rebalance needs one process; set group_by_length")
        return BatchRebalanceSampler(
            lengths=dataset.lengths.tolist(),
            effective_batch_size=order.step_rows,
            grad_accum=order.num_batches,
            dp_size=1,
            rank=0,
            drop_last=args.dataloader_drop_last,
        )
    return SequentialSampler(dataset) if args.train_sampling_strategy == "sequential" else RandomSampler(dataset)


class LengthGroupedSampler(Sampler[int]):
    """Order of an epoch in which consecutive batches hold rows of similar length.

    An optimizer step of several micro-batches takes one of each length class, so that it is a fair sample of the rows.
    Steps of long rows alone would give their tokens less weight, since every step counts the same.

    Args:
        lengths: tokens of every row.
        batch_size: rows of one micro-batch, over all ranks.
        num_batches: micro-batches of one optimizer step.
        seed: of the order.
        epoch: returns the epoch that begins, from 0; called when the sampler is iterated.
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
    """Return the permutation of the rows for `LengthGroupedSampler`, int64 (rows,).

    Rows are drawn into groups of `_BATCHES_COMPARED` batches (or a quarter of the rows if that is less, so that the rows
    of a batch differ between epochs). Each group is sorted, cut into batches and dealt out to its steps. The step with
    the longest row comes first, to show at once if memory suffices. Rows that fill no step come last.
    """
    lengths = np.asarray(lengths)
    step = batch_size * num_batches
    order = torch.randperm(len(lengths), generator=generator).numpy()
    full = len(order) // step * step
    steps_per_group = max(1, min(len(order) // (4 * batch_size), _BATCHES_COMPARED) // num_batches)
    for start in range(0, full, step * steps_per_group):
        group = order[start : min(start + step * steps_per_group, full)]
        # Every step gets one batch of each length class, longest first.
        classes = _longest_first(group, lengths).reshape(num_batches, -1, batch_size)
        dealt = [batches[torch.randperm(len(batches), generator=generator).numpy()] for batches in classes]
        group[:] = np.stack(dealt, axis=1).reshape(-1)
    steps = order[:full].reshape(-1, step)
    if len(steps):
        longest = lengths[steps].max(axis=1).argmax()
        steps[[0, longest]] = steps[[longest, 0]]
    # Rows that fill no batch come last: `dataloader_drop_last` then leaves out other rows in every epoch.
    short = len(order) - len(order) % batch_size
    order[full:short] = _longest_first(order[full:short], lengths)
    return order


def _longest_first(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sort by falling length; rows of one length stay in their order."""
    return rows[np.argsort(-lengths[rows], kind="stable")]


# ---- the rows of each rank ----


class RankOrder(Sampler[int]):
    """Rows laid out so that P ranks which take batches in turn share every P consecutive batches.

    Accelerate deals batches out in turn: rank p reads batch p, then batch p + P. Consecutive rows go to different ranks:
    after a sort by length the ranks run rows of similar length at the same time, and none waits for another.
    Missing rows at the end are `BLANK`. Accelerate alone would repeat rows from the beginning, which would count twice.

    Args:
        rows: a sampler, or the rows in order.
        batch_size: rows of one micro-batch on one rank.
        world_size: P.
        drop_last: leave out rows that do not fill a batch on every rank, instead of adding blank rows.
        epoch: returns the epoch that begins, from 0, for samplers with `set_epoch`.
    """

    def __init__(
        self,
        rows: Sampler[int] | Sequence[int],
        *,
        batch_size: int,
        world_size: int,
        drop_last: bool = False,
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        self._rows: Any = rows
        self._batch_size = batch_size
        self._world_size = world_size
        self._drop_last = drop_last
        self._epoch = epoch

    def __len__(self) -> int:
        together, rows = self._batch_size * self._world_size, len(cast(Sized, self._rows))
        return (rows // together if self._drop_last else -(-rows // together)) * together

    def __iter__(self) -> Iterator[int]:
        if hasattr(self._rows, "set_epoch"):
            self._rows.set_epoch(self._epoch())
        together = self._batch_size * self._world_size
        rows = list(self._rows)
        for start in range(0, len(self), together):
            # One batch for every rank, rank after rank.
            for rank in range(self._world_size):
                own = rows[start + rank : start + together : self._world_size]
                yield from own
                yield from [BLANK] * (self._batch_size - len(own))


class WithBlankRows(Dataset):
    """A dataset in which index `BLANK` is a row without tokens, which adds nothing to any loss or count."""

    def __init__(self, dataset: ExampleDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        return self.dataset[index] if index != BLANK else blank_like(self.dataset[0])


def blank_like(example: Example) -> Example:
    """Return a row without tokens that collates with `example`."""
    features = example.english_features
    zeros = None if features is None else {name: np.zeros_like(vector) for name, vector in features.items()}
    predictions = example.start_predictions
    none = None if predictions is None else (predictions[0][:0], predictions[1][:0])
    return replace(example, main=_NO_TOKENS, parallel=None, english_features=zeros, start_predictions=none)


# ---- data loaders ----


def train_loader(
    dataset: ExampleDataset,
    collator: DeepSupervisionCollator,
    args: DeepSupervisionConfig,
    order: DataOrder,
    *,
    batch_size: int,
    epoch: Callable[[], int],
) -> DataLoader:
    """Return the training loader that Accelerate then prepares; `batch_size` is that of one process."""
    rows: Any = train_sampler(dataset, args, order, epoch)
    workers = partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index)
    options = {"persistent_workers": args.dataloader_persistent_workers, "begin_worker": workers}
    if args.train_sampling_strategy == "batch_rebalance":
        return _loader(dataset, collator, args, batch_sampler=rows, **options)
    if args.world_size > 1:
        if type(rows) is RandomSampler:
            # Accelerate does the same for one process: the order depends on seed and epoch only.
            rows = SeedableRandomSampler(dataset, data_seed=args.data_seed)
        rows = RankOrder(
            rows, batch_size=batch_size, world_size=args.world_size, drop_last=args.dataloader_drop_last, epoch=epoch
        )
    options |= {"batch_size": batch_size, "drop_last": args.dataloader_drop_last}
    return _loader(dataset, collator, args, sampler=rows, **options)


def eval_loader(dataset: ExampleDataset, collator: DeepSupervisionCollator, args: DeepSupervisionConfig) -> DataLoader:
    """Return the loader of an evaluation that Accelerate then prepares: all rows, longest first; no sum depends on it."""
    rows: Any = _longest_first(np.arange(len(dataset)), dataset.lengths).tolist()
    if args.world_size > 1:
        rows = RankOrder(rows, batch_size=args.eval_batch_size, world_size=args.world_size)
    return _loader(dataset, collator, args, sampler=rows, batch_size=args.eval_batch_size)


def _loader(
    dataset: ExampleDataset,
    collator: DeepSupervisionCollator,
    args: DeepSupervisionConfig,
    *,
    begin_worker: Callable[[int], None] | None = None,
    **options: Any,
) -> DataLoader:
    return DataLoader(
        dataset if args.world_size == 1 else WithBlankRows(dataset),
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        # torch warns where there is nothing to copy to.
        pin_memory=args.dataloader_pin_memory and torch.accelerator.is_available(),
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
        in_order=getattr(args, "dataloader_in_order", True),
        worker_init_fn=ignore_signals_in_workers(begin_worker),
        **options,
    )
