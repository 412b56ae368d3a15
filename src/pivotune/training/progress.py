"""Progress displays of long preparations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

# A context that shows progress over a known number of items: `with progress("Analyzing", 128) as advance: advance(8)`.
# `advance` takes the number of items done so far.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def silent(title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Show nothing."""
    return nullcontext(lambda done: None)


@contextmanager
def tqdm_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a tqdm bar, as Transformers' trainer does."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=title) as bar:

        def advance(done: int) -> None:
            bar.update(done - bar.n)

        yield advance
