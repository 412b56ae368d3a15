"""What all verbs share: consoles, progress bars, where output goes and what it may contain."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pivotune.errors import UsageError
from pivotune.text.escaping import one_line, printable, printable_json
from pivotune.text.redaction import redact


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0


# This process among those that `torchrun` or `accelerate launch` started together, on all machines and on this one.
# Operators of clusters set WORLD_SIZE in every container; the launchers that start processes set LOCAL_RANK too.
SEVERAL_PROCESSES = _number("WORLD_SIZE") > 1 and "LOCAL_RANK" in os.environ
RANK, LOCAL_RANK = (_number("RANK"), _number("LOCAL_RANK")) if SEVERAL_PROCESSES else (0, 0)

# What a person reads goes to stdout, unless a program reads stdout (`--json`). Of several processes the first one speaks.
stdout = Console(highlight=False, quiet=RANK > 0)
stderr = Console(stderr=True, highlight=False, quiet=RANK > 0)

# EX_TEMPFAIL of sysexits.h: what a signal stopped can go on; job scripts ask for it to queue the job again.
EXIT_STOPPED = 75


def console(as_json: bool) -> Console:
    """Where text for a person goes."""
    return stderr if as_json else stdout


@contextmanager
def told_once() -> Iterator[None]:
    """Mistakes inside are met by every process, and told by one of each machine."""
    try:
        yield
    except UsageError as error:
        error.told = error.told or LOCAL_RANK > 0
        raise


def print_json(content: Any) -> None:
    """One JSON document on stdout, without colours or wrapping."""
    if RANK == 0:
        print(printable_json(json.dumps(content, ensure_ascii=False, indent=2)))


def print_json_line(content: Any) -> None:
    """One JSON document in a line of its own, at once: a program may wait for it."""
    print(printable_json(json.dumps(content, ensure_ascii=False)), flush=True)


def safe(text: object) -> str:
    """Text from outside for a place that reads rich's markup: nothing in it is obeyed, by rich or by the terminal."""
    return escape(printable(str(text)))


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
        task = bar.add_task(safe(title), total=total, note="")
        yield lambda done: bar.update(task, completed=done)


class _LogLines(logging.Handler):
    """Messages of our own loggers as harmless lines on stderr, whatever file names and files put into them."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # Looked up each time: a progress bar that is shown puts another stream there, to write above itself.
            print(one_line(redact(record.getMessage())), file=sys.stderr)
        except Exception:  # a training does not end for a message
            self.handleError(record)


@contextmanager
def log_on_stderr() -> Iterator[None]:
    """Print what the package warns of; the library alone installs no handler, and Python's own would print it raw."""
    logger, handler = logging.getLogger("pivotune"), _LogLines(logging.WARNING)
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and notices off the screen; errors still raise."""
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    if RANK:
        logging.getLogger("pivotune").setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(peft|torch|transformers|accelerate)\b")
