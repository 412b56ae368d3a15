"""A comparison in a terminal: one table for each set and metric, split where it is too wide."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from itertools import groupby

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pivotune.compare.comparison import Cell, Column, Comparison
from pivotune.compare.formats import (
    MARKS,
    column_count,
    difference_text,
    metric_title,
    notes,
    row_facts,
    seed_text,
    value_text,
)
from pivotune.compare.significance import Verdict

_STYLES = {Verdict.BETTER: "green", Verdict.WORSE: "red", Verdict.UNDECIDED: "dim", None: "dim"}
_NAME_WIDTH = 30  # longer names of rows go on in the next line, which the differences take anyway
_GAP = 3  # characters between two columns


def render_terminal(
    comparison: Comparison, width: int, printable: Callable[[str], str] = str
) -> Iterator[RenderableType]:
    """Tables, warnings and notes, to print one after the other.

    Args:
        width: of the terminal, in characters.
        printable: makes names from files harmless.
    """
    titles = [_title(comparison, index, printable) for index in range(len(comparison.rows))]
    room = width - max(len(line) for title in titles for line in title.plain.splitlines()) - 2
    indices = range(len(comparison.columns))
    for _, group in groupby(indices, lambda index: _group(comparison.columns[index])):
        for part in _fitting(comparison, list(group), room):
            yield _table(comparison, part, titles, printable)
    for warning in comparison.warnings:
        yield Text(f"warning: {printable(warning)}", style="yellow")
    for note in notes(comparison):
        yield Text(printable(note), style="dim")


def _group(column: Column) -> tuple[str, str]:
    return column.benchmark, column.metric.name


def _title(comparison: Comparison, index: int, printable: Callable[[str], str]) -> Text:
    label = "\n".join(textwrap.wrap(printable(comparison.rows[index].label), _NAME_WIDTH, break_on_hyphens=False))
    facts = row_facts(comparison, index)
    return Text.assemble(label, (f"\n{facts}", "dim")) if facts else Text(label)


def _fitting(comparison: Comparison, indices: list[int], room: int) -> list[list[int]]:
    """Columns of one set in as few parts as fit, of equal length where that fits too; a single column is never cut."""
    widths = {index: _width(comparison, index) + _GAP for index in indices}
    parts: list[list[int]] = [[]]
    for index in indices:
        if parts[-1] and sum(widths[other] for other in [*parts[-1], index]) > room:
            parts.append([])
        parts[-1].append(index)
    size = -(-len(indices) // len(parts))
    even = [indices[start : start + size] for start in range(0, len(indices), size)]
    return even if all(sum(widths[index] for index in part) <= room for part in even) else parts


def _width(comparison: Comparison, index: int) -> int:
    texts = [_cell(line[index], comparison.columns[index]).plain for line in comparison.cells]
    texts += [comparison.columns[index].short_name, column_count(comparison, index)]
    return max(len(line) for text in texts for line in text.splitlines())


def _table(comparison: Comparison, indices: list[int], titles: list[Text], printable: Callable[[str], str]) -> Table:
    first = comparison.columns[indices[0]]
    table = Table(
        title=Text(printable(f"{first.benchmark}  {metric_title(first)}"), style="bold cyan"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        leading=1,
    )
    table.add_column("", no_wrap=True)
    for index in indices:
        name, count = printable(comparison.columns[index].short_name), column_count(comparison, index)
        table.add_column(Text.assemble((name, "bold"), ("\n" + count, "dim")), justify="right", no_wrap=True)
    for title, cells in zip(titles, comparison.cells, strict=True):
        if any(cells[index] is not None for index in indices):
            table.add_row(title, *(_cell(cells[index], comparison.columns[index]) for index in indices))
    return table


def _cell(cell: Cell | None, column: Column) -> Text:
    """The value, and below it the difference and the test over seeds."""
    value = (value_text(cell, column), "bold" if cell is not None and cell.best else "")
    if cell is None or cell.difference is None:
        return Text.assemble(value)
    found = cell.difference
    mark = f" {MARKS[found.verdict]}" if found.verdict else ""
    lines = [f"{difference_text(found, column)}{mark}", *filter(None, [seed_text(found)])]
    return Text.assemble(value, *(("\n" + line, _STYLES[found.verdict]) for line in lines))
