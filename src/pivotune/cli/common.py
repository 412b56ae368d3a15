"""Shared by all verbs: the process's rank, consoles, JSON output, progress bars, log lines and option parsers."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from pivotune.errors import UsageError
from pivotune.text.escaping import one_line, printable, printable_json
from pivotune.text.redaction import redact

if TYPE_CHECKING:
    from pivotune.training.resilience.preemption import StopSignals


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0


# Rank of this process among those that `torchrun` or `accelerate launch` started, on all machines and on this one.
# Operators of clusters set WORLD_SIZE in every container; the launchers that start processes set LOCAL_RANK too.
SEVERAL_PROCESSES = _number("WORLD_SIZE") > 1 and "LOCAL_RANK" in os.environ
RANK, LOCAL_RANK = (_number("RANK"), _number("LOCAL_RANK")) if SEVERAL_PROCESSES else (0, 0)

# Text for a person goes to stdout, or to stderr where a program reads stdout (`--json`). Only rank 0 prints.
stdout = Console(highlight=False, quiet=RANK > 0)
stderr = Console(stderr=True, highlight=False, quiet=RANK > 0)

# EX_TEMPFAIL of sysexits.h: a training stopped by a signal can be resumed; job scripts queue the job again on this code.
EXIT_STOPPED = 75


def console(as_json: bool) -> Console:
    """Return the console for text that a person reads."""
    return stderr if as_json else stdout


def print_lines(out: Console, *lines: str, style: str | None = None) -> None:
    """Print whole lines as they are, to be copied: no wrapping, no markup, control characters visible."""
    for line in lines:
        out.print(printable(line), style=style, soft_wrap=True, markup=False)


def print_json(content: Any) -> None:
    """Print one JSON document on stdout, without colours or wrapping."""
    if RANK == 0:
        print(printable_json(json.dumps(content, ensure_ascii=False, indent=2)))


def safe(text: object) -> str:
    """Escape text from outside for rich's markup and for the terminal."""
    return escape(printable(str(text)))


def words(text: str) -> list[str]:
    """Split a comma-separated option."""
    return [word.strip() for word in text.split(",") if word.strip()]


# Keys of a run that other verbs have as options, as they stand in messages.
_OPTIONS = {
    "data.template: ": "--template ",
    "data.fold_system: true": "--fold-system",
    "data.max_prompt_tokens": "--max-tokens",
    "use data.on_bad_row: skip to leave them out": "mend them or leave them out",
}


@contextmanager
def own_options() -> Iterator[None]:
    """Name the verb's own options in messages about the keys of a run."""
    try:
        yield
    except UsageError as error:
        message = str(error)
        for key, option in _OPTIONS.items():
            message = message.replace(key, option)
        raise UsageError(message) from error


def check_inputs(models: Iterable[str], sources: Iterable[Any] = (), *, revision: str | None = None) -> None:
    """Report a missing model or data file before torch is imported, which takes seconds; a source without a name passes."""
    from pivotune.data.sources import check_source
    from pivotune.models.locating import locate

    for name in models:
        locate(name, revision)
    for source in sources:
        if isinstance(source, str):
            check_source(source)


def check_out(path: Path, *allowed: str, overwrite: bool) -> None:
    """Refuse an `--out` that does not end in one of `allowed` or cannot be written, before anything is computed."""
    if path.is_dir():
        raise UsageError(f"--out: {path} is a folder; name a file in it that ends in {' or '.join(allowed)}")
    if path.suffix not in allowed:
        raise UsageError(f"--out: {path} ends in {path.suffix or 'nothing'!r}; allowed: {', '.join(allowed)}")
    if path.exists() and not overwrite:
        raise UsageError(f"--out: {path} exists; add --overwrite or name another file")
    with _writing(path):
        TemporaryFile(dir=next(folder for folder in path.absolute().parents if folder.exists())).close()


def write_out(path: Path, text: str) -> None:
    """Write the file of an `--out`, and its folder if it is new."""
    from pivotune.text.files import write_text

    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"--out: {path} cannot be written ({error.strerror or error})") from error


@contextmanager
def reported_once() -> Iterator[None]:
    """Report a mistake that every process finds once per machine."""
    try:
        yield
    except UsageError as error:
        error.reported = error.reported or LOCAL_RANK > 0
        raise


@contextmanager
def stop_signals(next_step: Callable[[str | None], str]) -> Iterator[StopSignals]:
    """Handle signals that stop a training, and print `next_step` of the checkpoint that was saved, if one was."""
    from pivotune.training.resilience.preemption import StoppedBySignalError, StopSignals

    with StopSignals() as signals:
        try:
            yield signals
        except StoppedBySignalError as stop:
            print_lines(stderr, f"pivotune: stopped by {stop.name}: {next_step(stop.checkpoint)}")
            raise typer.Exit(EXIT_STOPPED) from None
        except KeyboardInterrupt:
            print_lines(stderr, next_step(None))
            raise


def progress_bar() -> RichProgress:
    """Return a progress display on stderr, so that stdout can be redirected."""
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
    return RichProgress(*columns, TextColumn("{task.fields[note]}"), console=stderr)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress over `total` items; yields a function of the number of items done (`training.progress.Progress`)."""
    with progress_bar() as bar:
        task = bar.add_task(safe(title), total=total, note="")
        yield lambda done: bar.update(task, completed=done)


class _LogLines(logging.Handler):
    """Print messages of the package's loggers as escaped lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # `sys.stderr` is read each time: a progress bar replaces it, to print above itself.
            print(one_line(redact(record.getMessage())), file=sys.stderr)
        except Exception:  # a message must not end a training
            self.handleError(record)


@contextmanager
def log_on_stderr() -> Iterator[None]:
    """Print the package's warnings; the library alone installs no handler, and Python's own would print them raw."""
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
    """Switch off the libraries' progress bars and notices; errors still raise."""
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    if RANK:
        logging.getLogger("pivotune").setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()
    for name in ("accelerate", "huggingface_hub"):  # the Hub's client warns at each retry
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(peft|torch|transformers|accelerate)\b")
