"""`pivotune sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pivotune.cli import options
from pivotune.cli.common import console, print_json, print_lines, progress, quiet_libraries, stop_signals, words
from pivotune.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from pivotune.sweeps.plan import Cell
    from pivotune.sweeps.run import Sweep


def sweep(
    config: Annotated[Path, typer.Argument(help="Run configuration (YAML) of all cells.")],
    grid: Annotated[list[str] | None, typer.Option(help="KEY=VALUE,VALUE. Repeat for the product.")] = None,
    ablation: Annotated[bool, typer.Option("--ablation", help="Paper's Table 3: TFT, each loss alone, both.")] = False,
    signals: Annotated[str, typer.Option(help="For --ablation: logits, feature or both; default: the run's.")] = "",
    seeds: Annotated[str, typer.Option(help="Comma-separated; default: the run's own.")] = "",
    tasks: Annotated[str, typer.Option(help="As in pivotune evaluate; default: held-out rows only.")] = "",
    changes: options.Changes = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default: sweeps/NAME of the YAML file.")] = None,
    languages: options.Languages = "",
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    split: options.Split = None,
    batch_size: options.BatchSize = "auto",
    max_new_tokens: options.MaxNewTokens = None,
    backend: options.Backend = "hf",
    dtype: options.Dtype = "auto",
    skip_missing: options.SkipMissing = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the cells, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print sweep.json's content on stdout.")] = False,
) -> None:
    """Train and evaluate every combination of values and seeds; the same command continues after an interruption."""
    from pivotune.evaluation.prepare import EvaluationSettings

    settings = EvaluationSettings(
        data_dir=data_dir,
        limit=limit,
        split=split,
        batch_size=options.parse_batch_size(batch_size),
        max_new_tokens=max_new_tokens,
        backend=backend,
        dtype=dtype,
        skip_missing=skip_missing,
    )
    codes = options.parse_languages(languages)
    folder = out or Path("sweeps") / (config.stem + ("-ablation" if ablation else ""))
    if signals and not ablation:
        raise UsageError("--signals goes with --ablation")
    cells = _plan(config, grid or [], changes or [], folder, seeds=seeds, signals=signals if ablation else None)
    screen = console(as_json)
    say = partial(print_lines, screen)
    failures: dict[str, str] = {}
    # From the reading of rows on.
    with stop_signals(lambda checkpoint: "the same command goes on from here") as stop:
        quiet_libraries()
        from pivotune.cli.training_display import TrainingProgress
        from pivotune.sweeps.run import DONE, describe_sweep, prepare_sweep, run_sweep

        prepared = prepare_sweep(config, folder, cells, words(tasks), settings, codes)
        if dry_run:
            if prepared.tasks:
                say(f"tasks: {', '.join(prepared.tasks)}")
            for name in prepared.bases:
                missing = prepared.missing(folder / name)
                say(f"{name}: " + (f"to evaluate: {', '.join(missing)}" if missing else DONE))
            states = {cell.name: prepared.state(cell) for cell in cells}
            for name, state in states.items():
                say(f"{name}: {state}")
            say(f"{list(states.values()).count(DONE)} of {len(states)} cells are done, in {folder}")
        else:
            failures = run_sweep(prepared, announce=say, watch=TrainingProgress, progress=progress, stop_signals=stop)
            saved = [*_write_tables(prepared, screen), *_write_curve(prepared)]
            say(f"saved    {', '.join(map(str, saved)) or 'nothing: no cell is finished'}")
    if as_json:
        print_json(describe_sweep(prepared, failures))
    if failures:
        say(f"{len(failures)} failed; the same command tries them again:")
        for name, reason in failures.items():
            say(f"  {name}: {reason}")
        raise typer.Exit(1)


def _plan(
    config: Path, grid: Sequence[str], changes: Sequence[str], folder: Path, *, seeds: str, signals: str | None
) -> list[Cell]:
    """Return the cells; `signals` is None without --ablation."""
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


def _write_tables(prepared: Sweep, screen: Console) -> list[Path]:
    """Print the table of the measured cells and starting models, and write it to files."""
    from pivotune.compare.comparison import compare_groups
    from pivotune.compare.formats import FORMATS, render, render_terminal
    from pivotune.compare.seed_groups import load_groups
    from pivotune.results.files import results_paths
    from pivotune.text.files import write_text

    folders = [*(prepared.folder / name for name in prepared.bases), *(cell.folder for cell in prepared.cells)]
    measured = [folder for folder in folders if results_paths(folder)[0].is_file()]
    if not measured:
        return []
    warnings: list[str] = []
    groups = load_groups(measured, warnings)
    known = {task for group in groups for run in group.runs for task in run.results.tasks}
    comparison = compare_groups(groups, tasks=[task for task in prepared.tasks if task in known], warnings=warnings)
    for part in render_terminal(comparison, screen.width):
        screen.print(part)
    paths = [prepared.folder / f"table{suffix}" for suffix in (".md", ".csv", ".tex")]
    for path in paths:
        write_text(path, render(comparison, FORMATS[path.suffix]))
    return paths


def _write_curve(prepared: Sweep) -> list[Path]:
    """Write the picture of a sweep over layers, and its numbers."""
    from pivotune.compare.layer_curve import layer_curve, swept_term
    from pivotune.report.figures.base import save_figure
    from pivotune.report.figures.layers import sweep_figure
    from pivotune.sweeps.run import swept_runs
    from pivotune.text.files import write_json

    runs = swept_runs(prepared)
    term = swept_term(runs)
    if term is None:
        return []
    curve = layer_curve(runs, term, prepared.tasks)
    paths = [prepared.folder / name for name in ("layers.png", "layer-scores.json")]
    save_figure(sweep_figure(curve), paths[0])
    write_json(paths[1], curve)
    return paths
