"""A folder that all processes write together: whole or not there, on every one of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from pivotune.training.distributed import ranks
from pivotune.training.resilience.checkpoints import STAGING, staged_folder


def save_together(final: Path, write: Callable[[Path], object]) -> None:
    """`write` into a staging folder on every rank; it becomes `final` when all have written. All ranks call this.

    The ranks need a file system that they share, as sharded checkpoints do. `write` may gather weights: a rank on which it
    fails leaves at once, and the others find it gone, for they may be waiting for it in a gathering.

    Raises:
        UsageError: the folder cannot be written on this rank; `final` is as it was before.
        OtherRankError: the main process could not begin or finish it.
        RuntimeError: another rank has left.
    """
    with ExitStack() as stack:
        ranks.agree(lambda: stack.enter_context(staged_folder(final)) if ranks.is_main() else None)
        write(final.parent / STAGING / final.name)
        ranks.wait_for_all()
        # The main process adds the checksums and renames; nobody goes on before it has.
        ranks.agree(stack.close)
