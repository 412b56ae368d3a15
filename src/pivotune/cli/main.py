"""The command `pivotune`. Verbs import their libraries when they run, so `pivotune --help` takes under half a second."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from pivotune import __version__
from pivotune.cli import (
    analyze,
    chat,
    compare,
    data,
    demo,
    estimate,
    evaluate,
    explore,
    export,
    init,
    report,
    sweep,
    train,
)
from pivotune.cli.common import LOCAL_RANK, RANK, SEVERAL_PROCESSES, log_on_stderr
from pivotune.errors import TrainingError, UsageError
from pivotune.text.escaping import printable
from pivotune.text.redaction import redact

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130  # and common.EXIT_STOPPED

# Read by the libraries when they are loaded; the user's own values win.
_ENVIRONMENT = {
    # OpenMP threads that spin while they wait take the CPU from other programs: with one busy process beside it
    # `pivotune demo` took more than 3.5 times as long. libgomp's GOMP_SPINCOUNT and Intel's KMP_BLOCKTIME override this.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Offsets and masks do not need the tokenizers' threads after a fork; without this every data worker warns.
    "TOKENIZERS_PARALLELISM": "true",
}

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
app.command("explore")(explore.explore)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("export")(export.export)
app.command("push")(export.push)


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
    """Options of all verbs. `main` removes `--debug` before parsing, so that it may also follow the verb."""
    if SEVERAL_PROCESSES and context.invoked_subcommand != "train":
        raise UsageError(
            f"`pivotune {context.invoked_subcommand}` works in one process; start it without torchrun or accelerate "
            "launch (`pivotune train` works in several)",
            reported=LOCAL_RANK > 0,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0, 2 for a mistake of the user, 75 for a training that a signal stopped, 130 for Ctrl-C, 1 for any other error.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or bool(os.environ.get("PIVOTUNE_DEBUG"))
    words = [word for word in words if word != "--debug"]
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with log_on_stderr():
            code = app(args=words, prog_name="pivotune", standalone_mode=False)
    except Exception as error:
        if debug and not hasattr(error, "exit_code"):
            raise
        return _report(error)
    except KeyboardInterrupt:
        return _interrupted()
    # Typer turns Ctrl-C within a verb into this code and returns it.
    return _interrupted() if code == EXIT_INTERRUPTED else int(code or 0)


def _interrupted() -> int:
    print("pivotune: stopped", file=sys.stderr)
    return EXIT_INTERRUPTED


def _report(error: Any) -> int:
    """Print an error in one line on stderr, one line in all for an error that every process meets; return the exit code."""
    # Typer carries its own copy of click's exceptions, which are recognized by their attributes.
    exit_code = getattr(error, "exit_code", None)
    if exit_code is not None:
        if LOCAL_RANK == 0:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
            else:
                context = getattr(error, "ctx", None)
                hint = f"; see {context.command_path} -h" if context else ""
                text = printable(redact(" ".join(error.format_message().split())))
                print(f"pivotune: error: {text.rstrip('.')}{hint}", file=sys.stderr)
        return int(exit_code)
    if type(error).__name__ == "Abort":
        return _interrupted()
    text = printable(redact(" ".join(str(error).split())))
    place = f"pivotune: process {RANK}" if RANK else "pivotune"
    if isinstance(error, UsageError):
        if not error.reported:
            print(f"{place}: error: {text}", file=sys.stderr)
        return EXIT_USAGE
    if isinstance(error, TrainingError):
        if type(error).__name__ != "OtherRankError":
            print(f"{place}: stopped: {text}", file=sys.stderr)
        return EXIT_FAILURE
    print(f"{place}: {type(error).__name__}: {text} (--debug shows where)", file=sys.stderr)
    return EXIT_FAILURE


if __name__ == "__main__":
    raise SystemExit(main())
