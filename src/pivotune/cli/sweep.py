"""`pivotune sweep`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pivotune.cli import evaluation_options as options
from pivotune.cli.common import (
    EXIT_STOPPED,
    batch_size_option,
    console,
    print_json,
    printable,
    progress,
    quiet_libraries,
    stderr,
    words,
)
from pivotune.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from pivotune.compare.comparison import Comparison
    from pivotune.sweeps.plan import Cell
    from pivotune.sweeps.run import Sweep
    from pivotune.training.resilience.preemption import StopSignals


def sweep(
    config: Annotated[Path, typer.Argument(help="Run configuration (YAML) that all cells are made from.")],
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid", help="A key and its values: supervision.thinking.layer=5,10,15. Repeat for the product."
        ),
    ] = None,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="The paper's Table 3: TFT, conversion alone, thinking alone, and both.")
    ] = False,
    signals: Annotated[
        str, typer.Option(help="Signals of --ablation: logits, feature or both; default: the run's own.")
    ] = "",
    seeds: Annotated[str, typer.Option(help="Comma-separated; default: the run's own.")] = "",
    tasks: Annotated[
        str, typer.Option(help="What to evaluate, as in pivotune evaluate; without it held-out rows only.")
    ] = "",
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key of all cells: training.max_steps=100. Repeatable.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the sweep; default: sweeps/NAME of the YAML file.", show_default=False),
    ] = None,
    languages: options.Languages = "",
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    split: options.Split = None,
    batch_size: options.BatchSize = "auto",
    max_new_tokens: options.MaxNewTokens = None,
    backend: options.Backend = "hf",
    dtype: options.Dtype = "auto",
    skip_missing: options.SkipMissing = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the cells and what is done, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print sweep.json's content on stdout.")] = False,
) -> None:
    """Train and evaluate every combination of values and seeds; the same command goes on after an interruption."""
    from pivotune.evaluation.settings import EvaluationSettings

    settings = EvaluationSettings(
        data_dir=data_dir,
        limit=limit,
        split=split,
        batch_size=batch_size_option(batch_size),
        max_new_tokens=max_new_tokens,
        backend=backend,
        dtype=dtype,
        skip_missing=skip_missing,
    )
    folder = out or Path("sweeps") / (config.stem + ("-ablation" if ablation else ""))
    if signals and not ablation:
        raise UsageError("--signals goes with --ablation")
    cells = _plan(config, grid or [], changes or [], folder, seeds=seeds, signals=signals if ablation else None)
    say = _printer(as_json)
    failures: dict[str, str] = {}
    with _stop_signals() as stop_signals:
        quiet_libraries()
        from pivotune.sweeps.run import describe_sweep, prepare_sweep

        prepared = prepare_sweep(config, folder, cells, words(tasks), settings, words(languages))
        if dry_run:
            _show_plan(prepared, say)
        else:
            failures = _run(prepared, say, stop_signals)
            _summarize(prepared, console(as_json))
    if as_json:
        print_json(describe_sweep(prepared, failures))
    if failures:
        _show_failures(failures, say)
        raise typer.Exit(1)


def _plan(
    config: Path, grid: Sequence[str], changes: Sequence[str], folder: Path, *, seeds: str, signals: str | None
) -> list[Cell]:
    """The cells; `signals` is None without --ablation."""
    from pivotune.config.yaml_text import load_config
    from pivotune.sweeps.plan import ablation_axis, parse_grid, parse_seeds, plan_cells

    if any(change.partition("=")[0].strip() == "output_dir" for change in changes):
        raise UsageError("--set output_dir: the cells of a sweep are written below --out")
    axes = parse_grid(grid)
    if signals is not None:
        axes.append(ablation_axis(load_config(config, changes), signals))
    if not axes and not seeds:
        raise UsageError("nothing to vary: give --grid key=v1,v2, --ablation or --seeds 0,1,2")
    return plan_cells(config, changes, axes, seeds=parse_seeds(seeds), folder=folder)


def _run(prepared: Sweep, say: Callable[[str], None], stop_signals: StopSignals) -> dict[str, str]:
    from pivotune.cli.training_display import TrainingProgress
    from pivotune.sweeps.run import run_sweep

    return run_sweep(prepared, announce=say, watch=TrainingProgress, progress=progress, stop_signals=stop_signals)


@contextmanager
def _stop_signals() -> Iterator[StopSignals]:
    """Listen for signals, also while rows are read and checked, and say how to go on."""
    from pivotune.training.resilience.preemption import StoppedBySignalError, StopSignals

    going_on = "the same command goes on from here"
    with StopSignals() as signals:
        try:
            yield signals
        except StoppedBySignalError as stop:
            stderr.print(f"pivotune: stopped by {stop.name}; {going_on}", soft_wrap=True, markup=False)
            raise typer.Exit(EXIT_STOPPED) from None
        except KeyboardInterrupt:
            stderr.print(going_on, soft_wrap=True, markup=False)
            raise


def _show_plan(prepared: Sweep, say: Callable[[str], None]) -> None:
    from pivotune.sweeps.state import missing_tasks

    if prepared.tasks:
        say(f"tasks: {', '.join(prepared.tasks)}")
    for name in prepared.bases:
        missing = missing_tasks(prepared.folder / name, prepared.tasks, prepared.settings)
        say(f"{name}: " + (f"to evaluate: {', '.join(missing)}" if missing else "done"))
    states = {cell.name: prepared.state(cell) for cell in prepared.cells}
    for name, state in states.items():
        say(f"{name}: {state}")
    say(f"{sum(state.done for state in states.values())} of {len(states)} cells are done, in {prepared.folder}")


def _summarize(prepared: Sweep, out: Console) -> None:
    """The table of all cells, on the screen and in files, and the picture of a sweep over layers."""
    from pivotune.compare.formats import FORMATS, render
    from pivotune.compare.terminal import render_terminal
    from pivotune.text.files import write_text

    saved = []
    comparison = _compare(prepared)
    if comparison is not None:
        for part in render_terminal(comparison, out.width, printable):
            out.print(part)
        for suffix in (".md", ".csv", ".tex"):
            saved.append(prepared.folder / f"table{suffix}")
            write_text(saved[-1], render(comparison, FORMATS[suffix]))
    saved += _draw(prepared)
    names = printable(", ".join(map(str, saved)))
    out.print(f"saved    {names or 'nothing: no cell is finished'}", soft_wrap=True, markup=False)


def _compare(prepared: Sweep) -> Comparison | None:
    """Starting model and cells, as far as they are measured; None where none is."""
    from pivotune.compare.comparison import compare_rows
    from pivotune.compare.seed_groups import load_rows
    from pivotune.results.files import results_paths

    folders = [*(prepared.folder / name for name in prepared.bases), *(cell.folder for cell in prepared.cells)]
    measured = [folder for folder in folders if results_paths(folder)[0].is_file()]
    if not measured:
        return None
    warnings: list[str] = []
    rows = load_rows(measured, warnings)
    there = {task for row in rows for run in row.runs for task in run.results.tasks}
    return compare_rows(rows, tasks=[task for task in prepared.tasks if task in there], warnings=warnings)


def _draw(prepared: Sweep) -> list[Path]:
    from pivotune.report.plots import plot_layer_sweep
    from pivotune.sweeps.layers import layer_curve, swept_term
    from pivotune.text.files import write_json

    term = swept_term(prepared.cells)
    if term is None:
        return []
    curve = layer_curve(prepared, term)
    paths = [prepared.folder / name for name in ("layers.png", "layer-scores.json")]
    plot_layer_sweep(curve, paths[0])
    write_json(paths[1], curve)
    return paths


def _show_failures(failures: Mapping[str, str], say: Callable[[str], None]) -> None:
    say(f"{len(failures)} failed; the same command tries them again:")
    for name, reason in failures.items():
        say(f"  {name}: {reason}")


def _printer(as_json: bool) -> Callable[[str], None]:
    """Whole lines as they are: no wrapping, no markup."""
    out = console(as_json)
    return lambda line: out.print(printable(line), soft_wrap=True, markup=False)
