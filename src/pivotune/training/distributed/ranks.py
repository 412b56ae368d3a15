"""Collective work outside the training step: done by one rank for all, or divided over the ranks.

Every rank must call each of these functions at the same place of the program. In one process they cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist

from pivotune.errors import TrainingError, UsageError
from pivotune.training.resilience.checkpoints import STAGING, staged_folder

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class OtherRankError(TrainingError):
    """Another rank has failed and reports the cause itself; this rank stops with it."""


def world_size() -> int:
    """Return the number of processes of this training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Return True in rank 0, which writes the files and prints."""
    return rank() == 0


def set_timeout(seconds: float) -> None:
    """Limit the time that a collective waits for another rank. Transformers does so on GPUs only."""
    if world_size() > 1:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def on_main(function: Callable[[], _Result]) -> _Result:
    """Call `function` on rank 0 and return its result on every rank.

    Raises:
        UsageError: on every rank, if `function` raises it.
        OtherRankError: on the other ranks, if `function` raises another error (rank 0 raises that error).
    """
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    failure: BaseException | None = None
    if is_main():
        try:
            outcome = [function(), None]
        except BaseException as error:  # a signal too: the other ranks must not wait for a process that leaves
            failure, outcome = error, [None, (isinstance(error, UsageError), str(error))]
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    result, problem = outcome
    if problem is not None:
        is_usage_error, text = problem
        raise (
            UsageError(text, reported=True)
            if is_usage_error
            else OtherRankError(f"the main process has failed: {text}")
        )
    return cast(_Result, result)


def agree(function: Callable[[], object]) -> None:
    """Call `function` on every rank and go on only if it succeeds on all of them.

    Raises:
        BaseException: the error of `function` on this rank.
        OtherRankError: `function` failed on another rank, which reports the cause itself.
    """
    failure: BaseException | None = None
    try:
        function()
    except BaseException as error:
        failure = error
    problems = gather_objects(None if failure is None else str(failure) or type(failure).__name__)
    if failure is not None:
        raise failure
    for number, problem in enumerate(problems):
        if problem is not None:
            raise OtherRankError(f"process {number} has failed: {problem}")


def gather_objects(item: _Item) -> list[_Item]:
    """Return the items of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def share_out(items: Sequence[_Item], blank: _Item) -> list[_Item]:
    """Return every P-th item for this rank of P, padded with `blank` so that all ranks get equally many."""
    count = -(-len(items) // world_size())
    own = list(items[rank() :: world_size()])
    return own + [blank] * (count - len(own))


def save_together(final: Path, write: Callable[[Path], object]) -> None:
    """Call `write(staging)` on every rank; the staging folder becomes `final` when all ranks have written.

    The ranks need a shared file system. `write` may gather weights. If it fails on a rank, that rank raises at once and
    does not wait for the others, which may be waiting for it in a gather.

    Raises:
        UsageError: the folder cannot be written on this rank; `final` is unchanged.
        OtherRankError: rank 0 could not create or rename the folder.
        RuntimeError: another rank has left.
    """
    with ExitStack() as stack:
        agree(lambda: stack.enter_context(staged_folder(final)) if is_main() else None)
        write(final.parent / STAGING / final.name)
        gather_objects(None)  # a barrier
        # Rank 0 adds the checksums and renames the folder; no rank goes on before that.
        agree(stack.close)
