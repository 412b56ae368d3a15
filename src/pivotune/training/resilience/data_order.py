"""How a run cuts the order of its rows into steps, kept with its checkpoints: another number of processes reads the same.

A step of 2 processes x 1 batch of 4 rows and one of 1 process x 2 batches of 4 rows hold the same 8 rows, if the order is
made the same way. Where batches are grouped by length the order depends on their sizes, so a resumed run makes it as the
run was begun.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pivotune.errors import UsageError
from pivotune.training.arguments import DeepSupervisionConfig

_SAME = ("train_sampling_strategy", "data_seed", "dataloader_drop_last")
DATA_ORDER_FILE = "data_order.json"


@dataclass(frozen=True, kw_only=True)
class DataOrder:
    """The shape of an optimizer step.

    Attributes:
        batch_rows: rows of one micro-batch, over all processes.
        num_batches: micro-batches of a step.
        num_processes: how many processes share a micro-batch; the order does not depend on it.
        train_sampling_strategy, data_seed, dataloader_drop_last: arguments of the training that a resumed run must have
            again; None in checkpoints of earlier versions.
    """

    batch_rows: int
    num_batches: int
    num_processes: int
    train_sampling_strategy: str | None = None
    data_seed: int | None = None
    dataloader_drop_last: bool | None = None

    @property
    def step_rows(self) -> int:
        """Rows of one optimizer step."""
        return self.batch_rows * self.num_batches

    def __str__(self) -> str:
        own = self.batch_rows // self.num_processes
        return f"{self.step_rows} rows a step ({own} x {self.num_batches} accumulated x {self.num_processes} processes)"


def order_of(args: DeepSupervisionConfig, batch_size: int) -> DataOrder:
    """The order of a new run; `batch_size` is that of one process."""
    return DataOrder(
        batch_rows=batch_size * args.world_size,
        num_batches=args.gradient_accumulation_steps,
        num_processes=args.world_size,
        train_sampling_strategy=args.train_sampling_strategy,
        data_seed=args.data_seed,
        dataloader_drop_last=args.dataloader_drop_last,
    )


def save_order(order: DataOrder, checkpoint: Path) -> None:
    """Write `data_order.json` into a checkpoint."""
    (checkpoint / DATA_ORDER_FILE).write_text(json.dumps(asdict(order)) + "\n", encoding="utf-8")


def resumed_order(checkpoint: Path, now: DataOrder) -> DataOrder:
    """The order that a run was begun with, which goes on in steps of `now`.

    Raises:
        UsageError: the steps would hold other rows, or an epoch have another number of steps; says which setting keeps
            them.
    """
    path = checkpoint / DATA_ORDER_FILE
    if not path.is_file():
        return now
    try:
        before = DataOrder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path}: cannot be read ({' '.join(str(error).split())}); resume from another one") from error
    if before.step_rows != now.step_rows:
        raise UsageError(f"{checkpoint} has {before} and this run {now}; {_remedy(before, now)}")
    same = {name: getattr(now, name) for name in _SAME if getattr(before, name) is None}
    before = replace(before, **same)
    for name in _SAME:
        then, current = getattr(before, name), getattr(now, name)
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


def _remedy(before: DataOrder, now: DataOrder) -> str:
    accumulated, rest = divmod(before.step_rows, now.batch_rows)
    if accumulated and not rest:
        return f"set training.gradient_accumulation_steps={accumulated}"
    return "choose per_device_train_batch_size and gradient_accumulation_steps for the same number"
