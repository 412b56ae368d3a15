"""Which tasks and metrics a comparison shows, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from pivotune.compare.seed_groups import Row, Run
from pivotune.errors import UsageError
from pivotune.results.files import TaskResult
from pivotune.results.metrics import Metric, MetricResult

ENGLISH = "en"
PRIMARY, ALL = "primary", "all"


@dataclass(frozen=True, slots=True)
class Column:
    """One metric of one task; `digits` after the point are shown, and equal shown means equally best."""

    task: str
    benchmark: str
    language: str
    metric: Metric
    digits: int

    @property
    def short_name(self) -> str:
        """The task without its benchmark: `vi`, `en-vi`."""
        return self.task.removeprefix(f"{self.benchmark}_") or self.task


def select_columns(rows: Sequence[Row], tasks: Sequence[str], metrics: Sequence[str]) -> list[Column]:
    """Sets in the order they come, each with its languages and English last.

    Args:
        tasks: glob patterns of tasks; none for all. English tasks come with any choice.
        metrics: `primary`, `all`, or glob patterns of metrics' names.

    Raises:
        UsageError: no results at all, or a pattern that matches nothing.
    """
    known = _known_tasks(rows)
    if not known:
        raise UsageError("no run has results of any task; pivotune evaluate measures them")
    _check_patterns("--tasks", tasks, known)
    chosen = _with_english([name for name in known if _is_wanted(name, tasks)], known)
    offered = {name: known[name].metrics for name in chosen}
    _check_patterns("--metrics", [m for m in metrics if m not in (PRIMARY, ALL)],
                    dict.fromkeys(name for names in offered.values() for name in names))  # fmt: skip
    benchmarks = list(dict.fromkeys(known[name].benchmark for name in chosen))
    chosen.sort(key=lambda name: (benchmarks.index(known[name].benchmark), known[name].language == ENGLISH))
    columns = [
        _column(rows, known[name], metric) for name in chosen for metric in _chosen_metrics(known[name], metrics)
    ]
    # All tasks of a set under one metric, then the next metric.
    order = list(dict.fromkeys((column.benchmark, column.metric.name) for column in columns))
    return sorted(columns, key=lambda column: order.index((column.benchmark, column.metric.name)))


def find_figures(row: Row, task: str, metric: str) -> list[tuple[Run, MetricResult]]:
    """One metric of one task of every run of a row that has it."""
    entries = [(run, run.results.tasks.get(task)) for run in row.runs]
    return [(run, entry.metrics[metric]) for run, entry in entries if entry is not None and metric in entry.metrics]


def _known_tasks(rows: Sequence[Row]) -> dict[str, TaskResult]:
    """Every task with the metrics that any run has of it (COMET may be at hand on one machine only)."""
    known: dict[str, TaskResult] = {}
    for row in rows:
        for run in row.runs:
            for name, task in run.results.tasks.items():
                earlier = known.get(name, task)
                known[name] = replace(earlier, metrics={**task.metrics, **earlier.metrics})
    return known


def _with_english(chosen: list[str], known: Mapping[str, TaskResult]) -> list[str]:
    """Harm to English is always shown: on the chosen sets, or on any others where those have no English."""
    benchmarks = {known[name].benchmark for name in chosen}
    english = [name for name, task in known.items() if task.language == ENGLISH]
    beside = [name for name in english if known[name].benchmark in benchmarks] or english
    return list(dict.fromkeys([*chosen, *beside]))


def _is_wanted(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(option: str, patterns: Sequence[str], known: Iterable[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise UsageError(f"{option}: nothing matches {pattern!r}; the runs have: {', '.join(known)}")


def _chosen_metrics(task: TaskResult, wanted: Sequence[str]) -> list[str]:
    names = []
    for pattern in wanted:
        if pattern == PRIMARY:
            names.append(task.primary)
        else:
            names += [name for name in task.metrics if pattern == ALL or fnmatchcase(name, pattern)]
    return list(dict.fromkeys(names))


def _column(rows: Sequence[Row], task: TaskResult, metric: str) -> Column:
    definition = task.metrics[metric].definition
    figures = [figure for row in rows for _, figure in find_figures(row, task.name, metric)]
    # Two decimals for percentages, as in the paper; a nat's third one is still far above rounding.
    large = definition.scale == 100 or any(abs(figure.value or 0) >= 10 for figure in figures)
    return Column(task.name, task.benchmark, task.language, definition, 2 if large else 3)
