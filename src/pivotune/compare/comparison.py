"""The table of `pivotune compare` as data: methods x tasks, what is best, and which differences can be told apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pivotune.compare.condition_warnings import condition_warnings, with_tasks
from pivotune.compare.seed_groups import Row, Run
from pivotune.compare.significance import (
    FEWEST_ITEMS,
    RESAMPLES,
    Difference,
    Sample,
    Verdict,
    difference,
    holm,
    shared_items,
)
from pivotune.compare.table_columns import ENGLISH, PRIMARY, Column, find_figures, select_columns
from pivotune.errors import UsageError
from pivotune.results.metrics import Metric, MetricResult, item_vectors, statistic

# Figures and items that disagree by more than rounding were not written together.
_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of the table.

    Attributes:
        value: of one run, or the mean over seeds; None where undefined.
        spread: standard error over items of one run, or standard deviation over seeds.
        by_run: value, standard error and item count of every run of the row that has the task, by seed.
        best: equal to the best of the column at the precision shown.
        difference: to the baseline; None for the baseline itself and where a warning says why.
    """

    value: float | None
    spread: float | None
    n: int
    by_run: tuple[tuple[Run, MetricResult], ...]
    best: bool = False
    difference: Difference | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Methods x tasks.

    Attributes:
        cells: one list per row, None where a row lacks the task.
        baseline: index of the row that differences are to.
        warnings: what makes figures less comparable than they look, a line each.
        notes: how to read the table, a line each.
    """

    rows: Sequence[Row]
    columns: Sequence[Column]
    cells: Sequence[Sequence[Cell | None]]
    baseline: int
    warnings: Sequence[str]
    notes: Sequence[str]
    resamples: int
    seed: int


def compare_rows(
    rows: Sequence[Row],
    *,
    baseline: int | None = None,
    tasks: Sequence[str] = (),
    metrics: Sequence[str] = (PRIMARY,),
    resamples: int = RESAMPLES,
    seed: int = 0,
    warnings: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare every row with the baseline on every task.

    Args:
        baseline: index of a row; None for the first that is plain translated fine-tuning, or else the first.
        tasks: glob patterns of tasks; none for all. English tasks are shown with any choice.
        metrics: `primary`, `all`, or glob patterns of metrics' names.
        warnings: lines to begin with, from loading the rows.
        progress: called with (columns done, columns in all).

    Raises:
        UsageError: a pattern that matches nothing.
    """
    if baseline is None:
        baseline = next((index for index, row in enumerate(rows) if row.method == "tft"), 0)
    found: dict[str, list[str]] = {}
    columns = select_columns(rows, tasks, metrics)
    table: list[list[Cell | None]] = [[] for _ in rows]
    for done, column in enumerate(columns):
        cells = [_cell(row, column) for row in rows]
        _add_differences(rows, cells, column, baseline, resamples, seed, found)
        _mark_best(cells, column)
        for line, cell in zip(table, cells, strict=True):
            line.append(cell)
        if progress:
            progress(done + 1, len(columns))
    adjusted = _adjust(table)
    lines = [*warnings, *with_tasks(found)]
    lines += condition_warnings(rows, list(dict.fromkeys(column.task for column in columns)))
    result = Comparison(rows, columns, adjusted, baseline, list(dict.fromkeys(lines)), (), resamples, seed)
    return replace(result, notes=_notes(result))


def _cell(row: Row, column: Column) -> Cell | None:
    figures = find_figures(row, column.task, column.metric.name)
    if not figures:
        return None
    values = [figure.value for _, figure in figures]
    n = min(figure.n for _, figure in figures)
    if len(figures) == 1:
        return Cell(values[0], figures[0][1].stderr, n, tuple(figures))
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return Cell(None, None, n, tuple(figures))
    return Cell(float(np.mean(known)), float(np.std(known, ddof=1)), n, tuple(figures))


def _mark_best(cells: list[Cell | None], column: Column) -> None:
    """In place. A row alone is not the best of anything."""
    shown = {
        index: round(cell.value, column.digits)
        for index, cell in enumerate(cells)
        if cell is not None and cell.value is not None
    }
    if column.metric.higher_is_better is None or len(shown) < 2:
        return
    best = (max if column.metric.higher_is_better else min)(shown.values())
    for index, value in shown.items():
        cell = cells[index]
        if value == best and cell is not None:
            cells[index] = replace(cell, best=True)


def _add_differences(
    rows: Sequence[Row],
    cells: list[Cell | None],
    column: Column,
    baseline: int,
    resamples: int,
    seed: int,
    warnings: dict[str, list[str]],
) -> None:
    """In place; a difference that cannot be had leaves a warning."""
    theirs = cells[baseline]
    for row, cell in zip(rows, cells, strict=True):
        if cell is not None and len(cell.by_run) < len(row.runs):
            _warn(
                warnings, column, f"only {len(cell.by_run)} of the {len(row.runs)} seeds of {row.label} have the task"
            )
    if theirs is None:
        _warn(warnings, column, f"{rows[baseline].label}, the baseline, does not have the task: no differences")
        return
    for index, cell in enumerate(cells):
        if cell is None or index == baseline:
            continue
        try:
            found = _difference(column, cell, theirs, resamples, seed)
        except UsageError as error:
            pair = f"{rows[index].label} and {rows[baseline].label}"
            _warn(warnings, column, f"no difference in {column.metric.name} between {pair}: {error}")
            continue
        cells[index] = replace(cell, difference=found)
        if found.n < max(cell.n, theirs.n):
            counts = f"{found.n} items of {cell.n} and {theirs.n}: the difference is over these"
            _warn(warnings, column, f"{rows[index].label} and {rows[baseline].label} share {counts}")


def _warn(warnings: dict[str, list[str]], column: Column, line: str) -> None:
    warnings.setdefault(line, []).append(column.task)


def _difference(column: Column, ours: Cell, theirs: Cell, resamples: int, seed: int) -> Difference:
    definitions = {figure.definition for cell in (ours, theirs) for _, figure in cell.by_run}
    if len(definitions) > 1:
        raise UsageError("it is not made in the same way in all runs")
    samples = [[_sample(column, run, figure) for run, figure in cell.by_run] for cell in (ours, theirs)]
    if column.metric.form == "ratio" and "nll" in column.metric.name:
        _check_same_units(column.metric, [*samples[0], *samples[1]])
    return difference(column.metric, *samples, resamples=resamples, seed=seed)


def _sample(column: Column, run: Run, figure: MetricResult) -> Sample:
    """A run's items, if they are those that its figure was made of."""
    items = run.results.items.get(column.task)
    if not items:
        raise UsageError(f"{run.results.path}: no usable items")
    try:
        vectors, _ = item_vectors(column.metric, list(items.values()))
        value = float(statistic(column.metric, vectors.sum(axis=0)))
    except ValueError as error:
        raise UsageError(f"{run.results.path}: {error}") from error
    if figure.value is None or not math.isclose(value, figure.value, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
        raise UsageError(f"{run.results.path}: its items give {value:.6g}, not {figure.value}")
    return Sample(items, run.seed)


def _check_same_units(metric: Metric, samples: Sequence[Sample]) -> None:
    """Log-likelihoods per token of other tokens, or of other texts, say nothing about each other."""
    per = metric.fields[1]
    for item in shared_items(samples):
        counts = [sample.items[item].get(per) for sample in samples]
        known = {count for count in counts if count is not None}
        if len(known) > 1:
            raise UsageError(
                f"item {item} has {' and '.join(map(str, sorted(known)))} {per}: other rows or another tokenizer"
            )


def _adjust(table: Sequence[Sequence[Cell | None]]) -> list[list[Cell | None]]:
    """Holm's correction over all differences of the table that could be better or worse."""
    tested = [cell.difference for line in table for cell in line if cell is not None and _is_test(cell.difference)]
    adjusted = iter(holm([test.p for test in tested if test is not None]))

    def adjust(cell: Cell | None) -> Cell | None:
        if cell is None or cell.difference is None or not _is_test(cell.difference):
            return cell
        return replace(cell, difference=replace(cell.difference, adjusted_p=next(adjusted)))

    return [[adjust(cell) for cell in line] for line in table]


def _is_test(found: Difference | None) -> bool:
    return found is not None and found.verdict is not None and math.isfinite(found.p)


def _notes(comparison: Comparison) -> list[str]:
    cells = [cell for line in comparison.cells for cell in line if cell is not None]
    differences = [cell.difference for cell in cells if cell.difference is not None]
    notes = [_spread_note(cells)]
    if differences:
        notes += _difference_notes(comparison, differences)
    if not any(column.language == ENGLISH for column in comparison.columns):
        notes.append("No run has an English task: harm to English was not measured.")
    return notes


def _spread_note(cells: Sequence[Cell]) -> str:
    single = any(len(cell.by_run) == 1 for cell in cells)
    several = any(len(cell.by_run) > 1 for cell in cells)
    parts = ["the standard error over items"] if single else []
    parts += ["the standard deviation over seeds where there are several"] if several and single else []
    parts += ["the standard deviation over seeds; values are means over them"] if several and not single else []
    return f"± is {', '.join(parts)}. Bold: best of the column."


def _difference_notes(comparison: Comparison, differences: Sequence[Difference]) -> list[str]:
    name = comparison.rows[comparison.baseline].label
    notes = [
        f"Differences are to {name}, with 95 % intervals: paired bootstrap over items ({comparison.resamples:,} "
        f"resamples, seed {comparison.seed}). Better or worse is said only where the interval excludes zero."
    ]
    if any(found.num_seeds for found in differences):
        notes.append(
            "Where there are several seeds the interval covers them too (Student's t); seeds p: t-test over seeds alone."
        )
    if any(not found.num_seeds for found in differences):
        notes.append("With one seed the interval covers the choice of items only, not the noise between training runs.")
    if few := sum(found.n < FEWEST_ITEMS for found in differences):
        notes.append(f"{few} differences are over fewer than {FEWEST_ITEMS} items, too few for any verdict.")
    tests = [found for found in differences if found.adjusted_p is not None]
    if len(tests) > 1:
        told = [found for found in tests if found.verdict is not Verdict.UNDECIDED]
        kept = sum((found.adjusted_p or 0) < 0.05 for found in told)
        notes.append(
            f"Intervals are not adjusted for the {len(tests)} comparisons made; after Holm's correction {kept} of "
            f"{len(told)} differences told apart stay below p 0.05."
        )
    return notes
