"""The command `pivotune`. Verbs import what they need when they run: `pivotune --help` answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from pivotune import __version__
from pivotune.cli import analyze, chat, compare, data, demo, estimate, evaluate, init, sweep, train
from pivotune.cli.common import LOCAL_RANK, RANK, SEVERAL_PROCESSES, log_on_stderr
from pivotune.errors import TrainingError, UsageError
from pivotune.text.escaping import printable
from pivotune.text.redaction import redact

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130  # and common.EXIT_STOPPED

app = typer.Typer(
    name="pivotune",
    help="Teach an English-centric language model your language: deep supervision fine-tuning (arXiv 2503.01275).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.add_typer(data.app, name="data")
app.command("analyze")(analyze.analyze)
app.command("init")(init.init)
app.command("estimate")(estimate.estimate)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("sweep")(sweep.sweep)
app.command("chat")(chat.chat)
app.command("compare")(compare.compare)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pivotune {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. May stand anywhere.")] = False,
) -> None:
    """Options of all verbs; `--debug` is taken out before parsing, so that it may also follow the verb."""
    if SEVERAL_PROCESSES and context.invoked_subcommand != "train":
        raise UsageError(
            f"`pivotune {context.invoked_subcommand}` works in one process; start it without torchrun or accelerate "
            "launch (`pivotune train` works in several)",
            told=LOCAL_RANK > 0,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0, 2 for a mistake of the user's, 75 for a training that a signal stopped, 130 for Ctrl-C, 1 for anything else.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or bool(os.environ.get("PIVOTUNE_DEBUG"))
    words = [word for word in words if word != "--debug"]
    # Offsets and masks do not need the tokenizers' threads after a fork; without this every data worker warns.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        with log_on_stderr():
            code = app(args=words, prog_name="pivotune", standalone_mode=False)
    except Exception as error:
        if debug and not hasattr(error, "exit_code"):
            raise
        return _report(error)
    except KeyboardInterrupt:
        return _stopped()
    # Typer turns Ctrl-C within a verb into this code and returns it.
    return _stopped() if code == EXIT_INTERRUPTED else int(code or 0)


def _stopped() -> int:
    print("pivotune: stopped", file=sys.stderr)
    return EXIT_INTERRUPTED


def _report(error: Exception) -> int:
    """One line on stderr for any error; of one that all processes meet, one line in all."""
    # Typer carries its own copy of click's exceptions: they are known by what they offer, not by their class.
    exit_code = getattr(error, "exit_code", None)
    if exit_code is not None:
        if LOCAL_RANK == 0:
            _show_usage(error)
        return int(exit_code)
    if type(error).__name__ == "Abort":
        return _stopped()
    text = printable(redact(" ".join(str(error).split())))
    place = f"pivotune: process {RANK}" if RANK else "pivotune"
    if isinstance(error, UsageError):
        if not error.told:
            print(f"{place}: error: {text}", file=sys.stderr)
        return EXIT_USAGE
    if isinstance(error, TrainingError):
        if type(error).__name__ != "OtherRankError":
            print(f"{place}: stopped: {text}", file=sys.stderr)
        return EXIT_FAILURE
    print(f"{place}: {type(error).__name__}: {text} (--debug shows where)", file=sys.stderr)
    return EXIT_FAILURE


def _show_usage(error: Exception) -> None:
    """What Typer has to say about the words of the command line, which may hold anything."""
    for name in ("message", "option_name", "param_hint"):
        if isinstance(text := getattr(error, name, None), str):
            setattr(error, name, printable(redact(text)))
    getattr(error, "show", lambda: None)()


if __name__ == "__main__":
    raise SystemExit(main())
