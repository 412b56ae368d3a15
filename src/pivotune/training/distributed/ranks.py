"""Work that several processes do together outside of the training step: one for all, or shared out.

Every function here is to be called by all ranks, at the same place of the program. With one process they cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch.distributed as dist

from pivotune.errors import TrainingError, UsageError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class OtherRankError(TrainingError):
    """Another process has failed and tells what has happened; this one leaves with it."""


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process among them, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


def on_main(function: Callable[[], _Result]) -> _Result:
    """What `function` returns on the main process, on all of them; the others wait meanwhile.

    Raises:
        UsageError: the same on all ranks, where it is raised on the main one.
        OtherRankError: on the others, where something else is raised on the main one (which raises that).
    """
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    failure: BaseException | None = None
    if is_main():
        try:
            outcome = [function(), None]
        except BaseException as error:
            # A signal too: the others must not wait for a process that leaves.
            failure, outcome = error, [None, (isinstance(error, UsageError), str(error))]
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    result, problem = outcome
    if problem is not None:
        is_mistake, text = problem
        raise UsageError(text, reported=True) if is_mistake else OtherRankError(f"the main process has failed: {text}")
    return cast(_Result, result)


def agree(function: Callable[[], object]) -> None:
    """Call `function` on every rank, and go on where it fails on none of them.

    Raises:
        BaseException: what it raises on this rank, be it for a signal.
        OtherRankError: it has failed on another one, which is named and tells it itself.
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


def wait_for_all() -> None:
    """Come back when all ranks are here."""
    gather_objects(None)


def gather_objects(item: _Item) -> list[_Item]:
    """The item of every rank, in their order, on all ranks."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def share_out(items: Sequence[_Item], blank: _Item) -> list[_Item]:
    """This rank's items, taken in turn; `blank` where there are none left, so that all ranks have equally many."""
    count = -(-len(items) // world_size())
    own = list(items[rank() :: world_size()])
    return own + [blank] * (count - len(own))
