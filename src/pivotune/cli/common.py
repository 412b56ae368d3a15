"""What all verbs share: consoles, progress bars, where output goes and what it may contain."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pivotune.errors import UsageError, make_visible

# What a person reads goes to stdout, unless a program reads stdout (`--json`).
stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


def console(as_json: bool) -> Console:
    """Where text for a person goes."""
    return stderr if as_json else stdout


def print_json(content: Any) -> None:
    """One JSON document on stdout, without colours or wrapping."""
    print(json.dumps(content, ensure_ascii=False, indent=2))


def words(text: str) -> list[str]:
    """The words of a comma-separated option."""
    return [word.strip() for word in text.split(",") if word.strip()]


def batch_size_option(text: str) -> int | Literal["auto"]:
    """A number or `auto`."""
    if text == "auto":
        return "auto"
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise UsageError(f"--batch-size: {text!r} found; allowed: a number from 1, or auto")
    return int(text)


def printable(text: str) -> str:
    """The text with every control and direction character made visible, one for one: data must not drive the terminal."""
    return make_visible(text.replace("\r\n", "\n"))


def progress_bar() -> Progress:
    """A progress display on stderr, so that stdout can be redirected."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=stderr)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress over `total` items; call what this yields with the number of items done so far."""
    with progress_bar() as bar:
        task = bar.add_task(title, total=total, note="")
        yield lambda done: bar.update(task, completed=done)


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and notices off the screen; errors still raise."""
    import logging
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(peft|torch|transformers|accelerate)\b")
