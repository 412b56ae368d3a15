"""A folder that all processes write together: whole or not there, on every one of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from pivotune.training import ranks
from pivotune.training.checkpoints import STAGING, staged_folder


def save_together(final: Path, write: Callable[[Path], object]) -> None:
    """`write` into a staging folder on every rank; it becomes `final` when all have written. All ranks call this.

    The ranks need a file system that they share, as sharded checkpoints do.

    Raises:
        UsageError: the folder cannot be written, on whatever rank; on all of them, and `final` is as it was before.
    """
    with ExitStack() as stack:
        ranks.agree(lambda: stack.enter_context(staged_folder(final)) if ranks.is_main() else None)
        ranks.agree(partial(write, final.parent / STAGING / final.name))
        # The main process adds the checksums and renames; nobody goes on before it has.
        ranks.agree(stack.close)
