"""`pivotune train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pivotune.cli.common import (
    EXIT_STOPPED,
    console,
    print_json,
    printable,
    progress,
    quiet_libraries,
    safe,
    stderr,
    told_once,
)

if TYPE_CHECKING:
    from rich.console import Console

    from pivotune.config.settings import RunConfig
    from pivotune.runs.execute import RunResult
    from pivotune.runs.prepare import PreparedRun
    from pivotune.training.resilience.preemption import StopSignals


def train(
    config: Annotated[Path, typer.Argument(help="Run configuration (YAML); `pivotune init` prints one.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key: training.num_train_epochs=1. Repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    auto_resume: Annotated[
        bool, typer.Option("--auto-resume", help="Go on where output_dir holds a run, start where it does not.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in output_dir.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout.")] = False,
) -> None:
    """Fine-tune a model and write a run folder."""
    from pivotune.config.yaml_text import load_config
    from pivotune.errors import UsageError

    if overwrite and (resume or auto_resume):
        raise UsageError(f"{'--resume' if resume else '--auto-resume'} and --overwrite exclude each other")
    with told_once():
        run_config = load_config(config, changes or [])
    out = console(as_json)
    from pivotune.runs.folder import check_same_run, holds_run, is_finished
    from pivotune.training.resilience.checkpoints import kept, remove_replaced
    from pivotune.training.resilience.preemption import StoppedBySignalError, StopSignals

    folder = Path(run_config.output_dir)
    if auto_resume and not resume:
        resume = holds_run(folder)
        if resume and is_finished(folder):
            check_same_run(folder, run_config)
            remove_replaced(folder)
            out.print(f"{safe(folder)} holds a finished run; --resume trains it further", soft_wrap=True)
            if as_json:
                print_json({"run": str(folder), **json.loads((folder / "results.json").read_text(encoding="utf-8"))})
            return
    with StopSignals() as signals:
        try:
            result = _run(run_config, out, signals, resume=resume, overwrite=overwrite)
        except StoppedBySignalError as stop:
            saved = f"saved {stop.checkpoint}" if stop.checkpoint else kept(folder)
            line = f"pivotune: stopped by {stop.name}: {saved}; go on with --resume"
            stderr.print(printable(line), soft_wrap=True, markup=False)
            raise typer.Exit(EXIT_STOPPED) from None
        except KeyboardInterrupt:
            stderr.print(printable(f"{kept(folder)}; go on with --resume"), soft_wrap=True, markup=False)
            raise
    if as_json:
        print_json({"run": str(result.folder), **result.results})
    else:
        describe_result(out, result)


def _run(config: RunConfig, out: Console, signals: StopSignals, *, resume: bool, overwrite: bool) -> RunResult:
    """Prepare and train; a failure after a signal is the signal's, which reaches data workers too."""
    from pivotune.errors import TrainingError

    quiet_libraries()
    from pivotune.cli.training_progress import TrainingProgress
    from pivotune.runs.execute import execute_run
    from pivotune.runs.prepare import prepare_run

    try:
        with told_once():
            prepared = prepare_run(config, overwrite=overwrite, resume=resume)
        if resume:
            start = prepared.checkpoint or "no checkpoint yet, from the beginning"
            out.print(f"resuming: {safe(start)}", soft_wrap=True)
        describe_run(out, prepared)
        describe_training(out, prepared)
        with TrainingProgress() as bar:
            return execute_run(prepared, resume=resume, callbacks=[bar], progress=progress, stop_signals=signals)
    except TrainingError:
        signals.check()
        raise


def describe_run(out: Console, prepared: PreparedRun) -> None:
    """What will be trained on what, and one decoded example with its mask: wrong masks fail silently otherwise."""
    from pivotune.config.registry import METHODS

    config, report = prepared.config, prepared.report
    out.print(f"[bold]model[/]    {safe(config.model)}", soft_wrap=True)
    out.print(f"[bold]method[/]   {_method_line(config)}", soft_wrap=True)
    out.print(f"[bold]data[/]     {len(prepared.train)} rows to train on, {len(prepared.validation)} held out")
    replayed = round(config.data.english_ratio * len(prepared.train))
    if METHODS[config.method].replay and replayed:
        out.print(f"         {replayed} of them in English (data.english_ratio {config.data.english_ratio:g})")
    if report.cut:
        cut = ", ".join(f"{part} of {count} rows" for part, count in report.cut.items())
        out.print(f"         cut at the token limits: {safe(cut)}")
    for rows, skipped in (("rows", prepared.skipped), ("held-out rows", prepared.heldout_skipped)):
        for reason, count in skipped.items():
            out.print(f"         left out: {count} {rows}: {safe(reason)}", soft_wrap=True)
    example = getattr(prepared.train[0], METHODS[config.method].main_language)
    out.print("[bold]example[/]  (only the [green]answer[/] is trained on; [cyan]query[/]; [dim]template[/])")
    out.print(mask_text(prepared.tokenizer, example), soft_wrap=True)


def describe_training(out: Console, prepared: PreparedRun) -> None:
    """How much is trained, in which steps, and whether memory will suffice; nothing where that cannot be told."""
    if out.quiet:
        return
    from pivotune.cli.estimate import gibibytes, training_words
    from pivotune.estimate.startup import startup_estimate

    found = startup_estimate(prepared.config, prepared.args, prepared.train)
    if found is None:
        return
    line = training_words(prepared.config, prepared.args, found.size, found.target, found.schedule)
    if found.peak is not None:
        has = "" if found.device.memory is None else f" (has {gibibytes(found.device.memory)})"
        line += f"; estimated peak {gibibytes(found.peak)} a device{has}"
    out.print(f"[bold]training[/] {line}", soft_wrap=True)
    if found.too_much:
        warning = "the device's memory will probably not suffice; `pivotune estimate` says what would fit"
        out.print(f"[bold yellow]warning[/]  {warning}", soft_wrap=True)


def mask_text(tokenizer: Any, side: Any) -> Any:
    """One example decoded from its tokens, coloured by role."""
    from rich.text import Text

    from pivotune.data.examples import preview

    styles = {"template": "dim", "query": "cyan", "answer": "green"}
    return Text.assemble(*((printable(segment.text), styles[segment.role]) for segment in preview(tokenizer, side)))


def describe_result(out: Console, result: RunResult) -> None:
    """Held-out NLL before and after, and where everything lies."""
    from rich.table import Table

    if result.layers:
        chosen = result.layers
        out.print(
            f"[bold]layers[/]   conversion {chosen['conversion']}, thinking {chosen['thinking']}: {safe(chosen['reason'])}",
            soft_wrap=True,
        )
    if result.results["tasks"]:
        table = Table("held-out rows", "n", "NLL per token before", "after", "NLL per character before", "after")
        for name, task in result.results["tasks"].items():
            base = task["base"]
            numbers = (base["value"], task["value"], base["nll_per_character"], task["nll_per_character"])
            table.add_row(safe(name.removeprefix("heldout_")), str(task["n"]), *(f"{number:.3f}" for number in numbers))
        out.print(table)
    # Whole and as they are, to be copied: no wrapping, no markup.
    saved = f"saved    {result.folder / 'model'}   (chat with it: pivotune chat {result.folder})"
    out.print(printable(saved), soft_wrap=True, markup=False)


def _method_line(config: Any) -> str:
    from pivotune.config.registry import METHODS

    if not METHODS[config.method].inner_losses:
        return config.method
    parts = []
    for name in ("conversion", "thinking"):
        signal = getattr(config.supervision, name)
        if signal.signal != "none":
            parts.append(f"{name} {signal.signal} at layer {signal.layer}, weight {signal.weight:g}")
    return f"deep-supervision: {'; '.join(parts)}; {config.supervision.schedule} schedule"
