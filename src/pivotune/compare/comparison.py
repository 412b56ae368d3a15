"""Compute the table of `pivotune compare`: methods x tasks, the best of each task, and significant differences."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from pivotune.compare.seed_groups import Run, SeedGroup
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
from pivotune.config.registry import BASELINE_METHOD
from pivotune.errors import UsageError
from pivotune.results.files import TaskResult
from pivotune.results.metrics import Metric, MetricResult, item_vectors, statistic

ENGLISH = "en"
PRIMARY, ALL = "primary", "all"
_TOLERANCE = 1e-6  # figures and items that disagree by more than rounding were not written together
# A difference in one explains different prompts.
_EXPLAINS_PROMPTS = {"split", "origin", "limit", "seed", "template", "pivot"}
_LONGEST_CONDITION = 60
_EQUAL_BUDGETS = 1.05  # trained tokens of one run for each of another
_MOST_NAMES = 4  # in a warning
_MOST_DIGITS, _NO_UNCERTAINTY = 5, 1e-6


@dataclass(slots=True)
class Column:
    """One metric of one task.

    Attributes:
        digits: decimals of its values, by their standard errors; values equal at these count as equal.
        difference_digits: decimals of its differences, by their intervals.
    """

    task: str
    benchmark: str
    language: str
    metric: Metric
    digits: int = 3
    difference_digits: int = 3

    @property
    def title(self) -> str:
        """The task without its benchmark: `vi`, `en-vi`."""
        return self.task.removeprefix(f"{self.benchmark}_") or self.task


@dataclass(slots=True)
class Measurement:
    """One figure of the table.

    Attributes:
        value: of one run, or the mean over seeds; None where undefined.
        spread: standard error over items of one run, or standard deviation over seeds.
        by_run: value, standard error and item count of every run of the group that has the task, by seed.
        best: equal to the best of the column at the precision shown.
        difference: to the baseline; None for the baseline itself, and for pairs that a warning names.
    """

    value: float | None
    spread: float | None
    n: int
    by_run: tuple[tuple[Run, MetricResult], ...]
    best: bool = False
    difference: Difference | None = None


Groups = Sequence[SeedGroup]
Figures = list[Measurement | None]  # of one column, by group
Warnings = dict[str, list[str]]  # line -> the tasks it is about


@dataclass(frozen=True, slots=True)
class Comparison:
    """Methods x tasks.

    Attributes:
        table: one list per group, with None for tasks that the group lacks.
        baseline: index of the group that differences are to.
        warnings, notes: reasons why figures are less comparable than they look, and explanations; one line each.
    """

    groups: Groups
    columns: Sequence[Column]
    table: Sequence[Sequence[Measurement | None]]
    baseline: int
    warnings: Sequence[str]
    notes: Sequence[str]
    resamples: int
    seed: int


def compare_groups(
    groups: Groups,
    *,
    baseline: int | None = None,
    tasks: Sequence[str] = (),
    metrics: Sequence[str] = (PRIMARY,),
    resamples: int = RESAMPLES,
    seed: int = 0,
    warnings: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare every group with the baseline on every task.

    Args:
        baseline: index of a group; None for the first of method `tft`, else the first.
        tasks: glob patterns of tasks; none for all. English tasks are always added.
        metrics: `primary`, `all`, or glob patterns of metrics' names.
        warnings: lines to begin with, from loading the groups.
        progress: called with (columns done, columns in all).
    """
    if baseline is None:
        baseline = next((index for index, group in enumerate(groups) if group.method == BASELINE_METHOD), 0)
    columns = _select_columns(groups, tasks, metrics)
    found: Warnings = defaultdict(list)
    by_column = []
    for done, column in enumerate(columns, start=1):
        by_column.append(_measure(groups, column, found))
        _add_differences(groups, by_column[-1], column, baseline, resamples, seed, found)
        if progress:
            progress(done, len(columns))
    table = list(zip(*by_column, strict=True))
    measurements = [measurement for line in table for measurement in line if measurement is not None]
    differences = [measurement.difference for measurement in measurements if measurement.difference]
    tests = [found for found in differences if found.verdict is not None and math.isfinite(found.p)]
    for test, adjusted in zip(tests, holm([test.p for test in tests]), strict=True):
        test.adjusted_p = adjusted
    lines = [*warnings, *_with_tasks(found), *_condition_warnings(groups, dict.fromkeys(c.task for c in columns))]
    lines += _budget_warning(groups)
    notes = _notes(columns, measurements, groups[baseline].label, resamples, seed)
    return Comparison(groups, columns, table, baseline, list(dict.fromkeys(lines)), notes, resamples, seed)


def _select_columns(groups: Groups, tasks: Sequence[str], metrics: Sequence[str]) -> list[Column]:
    """Return the columns by benchmark and metric, in the order of the results, English last."""
    known: dict[str, TaskResult] = {}
    for run in (run for group in groups for run in group.runs):
        for name, task in run.results.tasks.items():
            # A task has the metrics of all runs: COMET may be installed on one machine only.
            earlier = known.get(name, task)
            known[name] = replace(earlier, metrics={**task.metrics, **earlier.metrics})
    if not known:
        raise UsageError("no run has results of any task; pivotune evaluate measures them")
    _check_patterns("--tasks", tasks, known)
    chosen = [name for name in known if not tasks or any(fnmatchcase(name, pattern) for pattern in tasks)]
    # Harm to English is always shown: on the chosen benchmarks, or on all others where those have no English.
    english = [name for name, task in known.items() if task.language == ENGLISH]
    benchmarks = list(dict.fromkeys(known[name].benchmark for name in chosen))
    beside = [name for name in english if known[name].benchmark in benchmarks] or english
    chosen = list(dict.fromkeys([*chosen, *beside]))
    offered = dict.fromkeys(metric for name in chosen for metric in known[name].metrics)
    _check_patterns("--metrics", [pattern for pattern in metrics if pattern not in (PRIMARY, ALL)], offered)
    benchmarks = list(dict.fromkeys(known[name].benchmark for name in chosen))
    chosen.sort(key=lambda name: (benchmarks.index(known[name].benchmark), known[name].language == ENGLISH))
    columns = []
    for task in (known[name] for name in chosen):
        names: dict[str, None] = {}
        for pattern in metrics:
            matching = [name for name in task.metrics if pattern == ALL or fnmatchcase(name, pattern)]
            names |= dict.fromkeys([task.primary] if pattern == PRIMARY else matching)
        for name in names:
            columns.append(Column(task.name, task.benchmark, task.language, task.metrics[name].definition))
    # All tasks of a benchmark under one metric, then the next metric.
    order = list(dict.fromkeys((column.benchmark, column.metric.name) for column in columns))
    return sorted(columns, key=lambda column: order.index((column.benchmark, column.metric.name)))


def _check_patterns(option: str, patterns: Sequence[str], known: Iterable[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise UsageError(f"{option}: nothing matches {pattern!r}; the runs have: {', '.join(known)}")


def _measure(groups: Groups, column: Column, warnings: Warnings) -> Figures:
    """Return one column's figures with the best marked; a group alone has no best."""
    measured: Figures = []
    for group in groups:
        figures = tuple(group.figures(column.task, column.metric.name))
        if not figures:
            measured.append(None)
            continue
        if len(figures) < len(group.runs):
            line = f"only {len(figures)} of the {len(group.runs)} seeds of {group.label} have the task"
            warnings[line].append(column.task)
        values = [figure.value for _, figure in figures if figure.value is not None]
        value, spread = figures[0][1].value, figures[0][1].stderr
        if len(figures) > 1:
            defined = len(values) == len(figures)
            value, spread = (float(np.mean(values)), float(np.std(values, ddof=1))) if defined else (None, None)
        measured.append(Measurement(value, spread, min(figure.n for _, figure in figures), figures))
    known = [(m.value, m) for m in measured if m is not None and m.value is not None]
    column.digits = shown_digits([m.spread for _, m in known], 2 if any(abs(value) >= 10 for value, _ in known) else 3)
    if column.metric.higher_is_better is not None and len(known) > 1:
        best = (max if column.metric.higher_is_better else min)(value for value, _ in known)
        for value, measurement in known:
            measurement.best = round(value, column.digits) == round(best, column.digits)
    return measured


def _add_differences(
    groups: Groups, measured: Figures, column: Column, baseline: int, resamples: int, seed: int, warnings: Warnings
) -> None:
    """Set the differences of a column to the baseline; one that cannot be computed leaves a warning."""
    theirs, name = measured[baseline], groups[baseline].label
    if theirs is None:
        warnings[f"{name}, the baseline, does not have the task: no differences"].append(column.task)
        return
    for group, ours in zip(groups, measured, strict=True):
        if ours is None or ours is theirs:
            continue
        line = None
        try:
            found = ours.difference = _difference(column, ours, theirs, resamples, seed)
            if found.n < max(ours.n, theirs.n):
                counts = f"{found.n} items of {ours.n} and {theirs.n}: the difference is over these"
                line = f"{group.label} and {name} share {counts}"
        except UsageError as error:
            line = f"no difference in {column.metric.name} between {group.label} and {name}: {error}"
        if line:
            warnings[line].append(column.task)
    found = [(m.difference.low, m.difference.high, m.difference.verdict) for m in measured if m and m.difference]
    column.difference_digits = difference_digits(found, column.digits)


def shown_digits(uncertainties: Iterable[float | None], otherwise: int) -> int:
    """Return the decimals for two significant digits of the smallest uncertainty: 1 for 3.3, 4 for 0.0012.

    Args:
        uncertainties: standard errors, or half-widths of intervals, of figures in one column; rounding errors are none.
        otherwise: returned where no figure has one.
    """
    known = [each for each in uncertainties if each and each > _NO_UNCERTAINTY]
    return min(_MOST_DIGITS, max(0, 1 - math.floor(math.log10(min(known))))) if known else otherwise


def difference_digits(found: Iterable[tuple[float, float, Verdict | None]], otherwise: int) -> int:
    """Return the decimals of (low, high, verdict): as `shown_digits`, and no bound that decides a verdict shows as 0."""
    found = list(found)
    nearest = [min(abs(low), abs(high)) for low, high, verdict in found if verdict in (Verdict.BETTER, Verdict.WORSE)]
    digits = shown_digits([(high - low) / 2 for low, high, _ in found], otherwise)
    return max(digits, shown_digits([10 * bound for bound in nearest], 0))


def _difference(column: Column, ours: Measurement, theirs: Measurement, resamples: int, seed: int) -> Difference:
    metric = column.metric
    if len({figure.definition for side in (ours, theirs) for _, figure in side.by_run}) > 1:
        raise UsageError("the runs define it differently")
    samples = [[_sample(column, run, figure) for run, figure in side.by_run] for side in (ours, theirs)]
    if metric.form == "ratio" and "nll" in metric.name:
        # Log-likelihoods per token of other tokens, or of other texts, are not comparable.
        per = metric.fields[1]
        everyone = [*samples[0], *samples[1]]
        for item in shared_items(everyone):
            counts: set[Any] = {sample.items[item].get(per) for sample in everyone} - {None}
            if len(counts) > 1:
                found = " and ".join(map(str, sorted(counts)))
                raise UsageError(f"item {item} has {found} {per}: other rows, token limits or another tokenizer")
    return difference(metric, *samples, resamples=resamples, seed=seed)


def _sample(column: Column, run: Run, figure: MetricResult) -> Sample:
    """Return a run's items; refuse items that do not reproduce its figure."""
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


def _condition_warnings(groups: Groups, tasks: Iterable[str]) -> list[str]:
    """Return one line for each condition (limit, split, template, ...) that differs between runs."""
    found: Warnings = defaultdict(list)
    for task in tasks:
        by_value: dict[str, dict[str, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
        for group in groups:
            for run in (run for run in group.runs if task in run.results.tasks):
                for key, value in run.results.tasks[task].conditions.items():
                    by_value[key][_condition_text(value)][group.label] = None
        differing = {key: labels for key, labels in by_value.items() if len(labels) > 1}
        if len(by_value["prompt_hash"]) == 1:
            # One template under two names: a run's Jinja file is the chat template of its model.
            differing.pop("template", None)
        if _EXPLAINS_PROMPTS.intersection(differing):
            differing.pop("prompt_hash", None)
        for key, labels in differing.items():
            values = "; ".join(
                f"{value if len(value) <= _LONGEST_CONDITION else value[: _LONGEST_CONDITION - 3] + '...'} in "
                f"{_name_some(list(names))}"
                for value, names in labels.items()
            )
            verb = "the prompts differ" if key == "prompt_hash" else f"{key} differs"
            found[f"{verb} between runs: {values}"].append(task)
    return _with_tasks(found)


def _budget_warning(groups: Groups) -> list[str]:
    """Return one line if the runs were trained on different numbers of tokens."""
    tokens = {group.label: [run.results.trained_tokens or 0 for run in group.runs] for group in groups}
    counted = [count for counts in tokens.values() for count in counts if count]
    if not counted or max(counted) <= _EQUAL_BUDGETS * min(counted):
        return []
    found = "; ".join(f"{max(counts):,} in {label}" for label, counts in tokens.items() if any(counts))
    return [f"trained tokens differ by more than 5 % between runs: {found}; data.token_budget makes them equal"]


def _condition_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_condition_text, value)) or "none"
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _with_tasks(found: Warnings) -> list[str]:
    """Append to each warning the names of its tasks."""
    return [f"{line} ({_name_some(list(dict.fromkeys(tasks)))})" for line, tasks in found.items()]


def _name_some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _notes(
    columns: Sequence[Column], measurements: Sequence[Measurement], baseline: str, resamples: int, seed: int
) -> list[str]:
    several = {len(measurement.by_run) > 1 for measurement in measurements}
    meaning = "the standard error over items"
    if True in several:
        meaning += ", the standard deviation over seeds where there are several"
    if several == {True}:
        meaning = "the standard deviation over seeds; values are means over them"
    notes = [f"± is {meaning}. Bold: best of the column."]
    differences = [measurement.difference for measurement in measurements if measurement.difference]
    if differences:
        notes.append(
            f"Differences are to {baseline}, with 95 % intervals. A method is called better or worse only where the "
            "interval excludes zero."
        )
    if any(found.num_seeds for found in differences):
        notes.append("Where there are several seeds the interval covers items and seeds (Student's t).")
    if any(not found.num_seeds for found in differences):
        notes.append(
            f"With one run against one the interval is a paired bootstrap over items ({resamples:,} resamples, seed "
            f"{seed}). It leaves out the noise between training runs, which alone can move a figure by points: train "
            "3 seeds or more to claim a difference between methods."
        )
    if few := sum(found.n < FEWEST_ITEMS for found in differences):
        notes.append(
            f"{few} differences are over fewer than {FEWEST_ITEMS} items, too few for a verdict, also where the interval "
            "leaves out zero."
        )
    tests = [found for found in differences if found.adjusted_p is not None]
    if len(tests) > 1:
        told = [found for found in tests if found.verdict is not Verdict.UNDECIDED]
        kept = sum((found.adjusted_p or 0) < 0.05 for found in told)
        notes.append(
            f"Intervals are not adjusted for the {len(tests)} comparisons made; after Holm's correction {kept} of "
            f"{len(told)} differences told apart stay below p 0.05."
        )
    if not any(column.language == ENGLISH for column in columns):
        notes.append("No run has an English task: harm to English was not measured.")
    return notes
