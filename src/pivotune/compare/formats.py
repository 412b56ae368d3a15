"""Write a comparison as Markdown, LaTeX, CSV or JSON, or for a terminal."""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pivotune.compare.comparison import Column, Comparison, Measurement
from pivotune.compare.significance import CONFIDENCE, Verdict
from pivotune.text.escaping import csv_text, latex, markdown, one_line, printable
from pivotune.text.files import finite

FORMATS = {".md": "markdown", ".tex": "latex", ".csv": "csv", ".json": "json"}
# Mark, mark in LaTeX and colour of a verdict.
_MARKS = {
    Verdict.BETTER: ("▲", "^{+}", "green"), Verdict.WORSE: ("▼", "^{-}", "red"), Verdict.UNDECIDED: ("≈", "", "dim"),
    None: ("", "", "dim"),
}  # fmt: skip
_LEGEND = "▲ better, ▼ worse, ≈ not told apart."
_LATEX_LEGEND = "$^{+}$ better, $^{-}$ worse; no mark: not told apart."
_MISSING = "–"
_NO_SEEDS = "training noise left out"  # below each difference of one run to one, where a reader sees it
_ARROWS = {True: ("↑", r" $\uparrow$"), False: ("↓", r" $\downarrow$"), None: ("", "")}
_CSV_FIELDS = (
    "row", "kind", "method", "seeds", "path", "task", "benchmark", "language", "metric", "higher_is_better", "value",
    "stderr", "seed_sd", "n", "best", "baseline", "difference", "low", "high", "p", "adjusted_p", "n_shared",
    "covers", "test", "degrees", "verdict",
)  # fmt: skip

_NAME_WIDTH = 30  # longer names continue in the lines that the differences need anyway
_GAP = 3  # characters between two columns of a terminal


def render(comparison: Comparison, form: str) -> str:
    """Return the content of a file; `form` is one of the values of `FORMATS`."""
    if form == "json":
        return json.dumps(to_dict(comparison), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    return {"markdown": to_markdown, "latex": to_latex, "csv": to_csv}[form](comparison)


# ---- parts of all formats ----


def value_text(value: float | None, spread: float | None, digits: int) -> str:
    """Return `29.7 ± 1.2`, or a dash where there is no value."""
    if value is None:
        return _MISSING
    return _number(value, digits) + ("" if spread is None else f" ± {spread:.{digits}f}")


def difference_text(value: float, low: float | None, high: float | None, digits: int) -> str:
    """Return `+2.3 [0.2, 4.4]`, without the interval where there is none."""
    text = _number(value, digits, "+")
    if low is None or high is None or math.isnan(low):
        return text
    return f"{text} [{_number(low, digits)}, {_number(high, digits)}]"


def _number(value: float, digits: int, sign: str = "") -> str:
    """Return the number, without the minus of a value that is rounded to zero."""
    text = f"{value:{sign}.{digits}f}"
    return f"{0:{sign}.{digits}f}" if float(text) == 0 else text


def _cell_lines(measurement: Measurement | None, column: Column, *, latex_mark: bool = False) -> list[str]:
    """Return the value; below it the difference with its mark, and what its interval leaves out."""
    if measurement is None:
        return [_MISSING]
    lines = [value_text(measurement.value, measurement.spread, column.digits)]
    if found := measurement.difference:
        text = difference_text(found.value, found.low, found.high, column.difference_digits)
        symbol, superscript, _ = _MARKS[found.verdict]
        lines.append(text + superscript if latex_mark else f"{text} {symbol}".rstrip())
        lines += [] if found.num_seeds or math.isnan(found.low) else [_NO_SEEDS]
    return lines


def group_facts(comparison: Comparison, index: int) -> str:
    """Return `baseline, 3 seeds`, or a part of it, or nothing."""
    runs = len(comparison.groups[index].runs)
    facts = ["baseline"] if index == comparison.baseline and len(comparison.groups) > 1 else []
    return ", ".join([*facts, *([f"{runs} seeds"] if runs > 1 else [])])


def group_title(comparison: Comparison, index: int) -> str:
    """Return `tft (baseline, 3 seeds)`."""
    label, facts = comparison.groups[index].label, group_facts(comparison, index)
    return f"{label} ({facts})" if facts else label


def metric_title(column: Column) -> str:
    """Return `f1 ↑`."""
    return f"{column.metric.name} {_ARROWS[column.metric.higher_is_better][0]}".strip()


def column_count(comparison: Comparison, index: int) -> str:
    """Return `n 1190`, or `n 40-1190` where the runs have different numbers of items."""
    counts = [measurement.n for line in comparison.table if (measurement := line[index]) is not None]
    low, high = min(counts), max(counts)
    return f"n {low}" if low == high else f"n {low}-{high}"


def notes(comparison: Comparison) -> list[str]:
    """Return the comparison's notes, with the legend of the marks where there are any."""
    found = [measurement.difference for line in comparison.table for measurement in line if measurement is not None]
    legend = [_LEGEND] if any(difference and difference.verdict for difference in found) else []
    return [*comparison.notes[:1], *legend, *comparison.notes[1:]]


# ---- JSON and CSV ----


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """Return everything as plain data; undefined numbers are None."""
    return {
        "baseline": comparison.groups[comparison.baseline].label,
        "resamples": comparison.resamples,
        "seed": comparison.seed,
        "confidence": CONFIDENCE / 100,
        "rows": [
            {"label": group.label, "method": group.method, "seeds": group.seeds}
            | {"paths": [str(run.results.path) for run in group.runs]}
            for group in comparison.groups
        ],
        "cells": [
            {"row": group.label, **_cell_dict(column, measurement)}
            for group, line in zip(comparison.groups, comparison.table, strict=True)
            for column, measurement in zip(comparison.columns, line, strict=True)
            if measurement is not None
        ],
        "warnings": list(comparison.warnings),
        "notes": list(comparison.notes),
    }


def to_csv(comparison: Comparison) -> str:
    """Return one line per group, task and metric.

    `kind` is `run`, or `seeds` for a mean over seeds, which one line of kind `seed` per run follows.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_CSV_FIELDS)
    content = to_dict(comparison)
    methods = {row["label"]: row["method"] for row in content["rows"]}
    for cell in content["cells"]:
        runs, found = cell.pop("runs"), cell.pop("difference") or {}
        single, cell["method"] = len(runs) == 1, methods[cell["row"]]
        line = {
            **found,
            **cell,
            "kind": "run" if single else "seeds",
            "seeds": " ".join(str(run["seed"]) for run in runs if run["seed"] is not None),
            "path": runs[0]["path"] if single else "",
            "baseline": content["baseline"],
            "difference": found.get("value"),
            "n_shared": found.get("n"),
        }
        blank = {"best": None, "seed_sd": None}
        members = [{**cell, **blank, **run, "kind": "seed", "seeds": run["seed"]} for run in runs if not single]
        for own in (line, *members):
            writer.writerow([csv_text(own.get(key)) for key in _CSV_FIELDS])
    return buffer.getvalue()


def _cell_dict(column: Column, measurement: Measurement) -> dict[str, Any]:
    several, found = len(measurement.by_run) > 1, measurement.difference
    return {
        "task": column.task,
        "benchmark": column.benchmark,
        "language": column.language,
        "metric": column.metric.name,
        "higher_is_better": column.metric.higher_is_better,
        "value": measurement.value,
        "stderr": None if several else measurement.spread,
        "seed_sd": measurement.spread if several else None,
        "n": measurement.n,
        "best": measurement.best,
        "runs": [
            {"path": str(run.results.path), "seed": run.seed, "value": own.value, "stderr": own.stderr, "n": own.n}
            for run, own in measurement.by_run
        ],
        "difference": found and {**finite(asdict(found)), "covers": "items and seeds" if found.num_seeds else "items"},
    }


# ---- Markdown and LaTeX ----


def to_markdown(comparison: Comparison) -> str:
    """Return one table with differences below the values, in the same cells."""
    heads = ["method"] + [
        f"{markdown(f'{column.benchmark} {column.title}')}<br>{markdown(metric_title(column))}, "
        f"{column_count(comparison, index)}"
        for index, column in enumerate(comparison.columns)
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * len(comparison.columns) + "|"]
    for index, measurements in enumerate(comparison.table):
        cells = [markdown(group_title(comparison, index))]
        for measurement, column in zip(measurements, comparison.columns, strict=True):
            first, *below = _cell_lines(measurement, column)
            cells.append("<br>".join([f"**{first}**" if measurement and measurement.best else first, *below]))
        lines.append(f"| {' | '.join(cells)} |")
    below = [*(f"**Warning:** {markdown(line)}" for line in comparison.warnings), *map(markdown, notes(comparison))]
    return "\n".join(lines) + "\n\n" + "\n\n".join(below) + "\n"


def to_latex(comparison: Comparison) -> str:
    """Return a `table` for the package booktabs, with each method's differences below its values."""
    columns = comparison.columns
    arrows = [_ARROWS[column.metric.higher_is_better][1] for column in columns]
    heads = [f"{latex(c.benchmark)} ({latex(c.metric.name)}{arrow})" for c, arrow in zip(columns, arrows, strict=True)]
    groups = [(head, len(list(same))) for head, same in groupby(heads)]
    rules, start = [], 2
    for _, width in groups:
        rules.append(rf"\cmidrule(lr){{{start}-{start + width - 1}}}")
        start += width
    lines = [f"% warning: {one_line(warning)}" for warning in comparison.warnings]
    lines += ["% needs \\usepackage{booktabs}", r"\begin{table}", r"\centering", r"\small"]
    lines += [rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule"]
    lines += [" & ".join(["", *(rf"\multicolumn{{{width}}}{{c}}{{{head}}}" for head, width in groups)]) + r" \\"]
    lines += [" ".join(rules), " & ".join(["method", *(latex(column.title) for column in columns)]) + r" \\"]
    lines += [" & ".join(["", *(column_count(comparison, i).replace("-", "--") for i in range(len(columns)))]) + r" \\"]
    for index in range(len(comparison.groups)):
        lines += [r"\addlinespace" if index else r"\midrule", *_latex_lines(comparison, index)]
    caption = " ".join([*map(latex, comparison.notes[:1]), _LATEX_LEGEND, *map(latex, comparison.notes[1:])])
    lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{caption}}}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _latex_lines(comparison: Comparison, index: int) -> list[str]:
    """Return one method's values, then its differences and what their intervals leave out, where there are any."""
    columns = [[latex(group_title(comparison, index)), "", ""]]
    for measurement, column in zip(comparison.table[index], comparison.columns, strict=True):
        first, *below = _cell_lines(measurement, column, latex_mark=True)
        value = rf"\textbf{{{latex(first)}}}" if measurement and measurement.best else latex(first)
        # In mathematics a hyphen is a minus, and a space needs a tilde.
        small = [text if text == _NO_SEEDS else f"${text.replace(' ', '~')}$" for text in below]
        columns.append([value, *(rf"{{\footnotesize {text}}}" for text in small), *[""] * (2 - len(small))])
    return [" & ".join(line) + r" \\" for line in zip(*columns, strict=True) if any(line)]


# ---- terminal ----


def render_terminal(comparison: Comparison, width: int) -> Iterator[RenderableType]:
    """Yield tables, warnings and notes to print: one table per benchmark and metric, split beyond `width` characters."""
    columns = comparison.columns
    titles, heads = [], []
    for index, group in enumerate(comparison.groups):
        label = "\n".join(textwrap.wrap(printable(group.label), _NAME_WIDTH, break_on_hyphens=False))
        facts = group_facts(comparison, index)
        titles.append(Text.assemble(label, (f"\n{facts}", "dim")) if facts else Text(label))
    for index, column in enumerate(columns):
        count = column_count(comparison, index)
        heads.append(Text.assemble((printable(column.title), "bold"), ("\n" + count, "dim")))
    cells = [list(map(_terminal_cell, line, columns)) for line in comparison.table]
    widths = [max(map(_text_width, texts)) + _GAP for texts in zip(heads, *cells, strict=True)]
    room = width - max(map(_text_width, titles)) - 2
    for _, same in groupby(range(len(columns)), lambda index: (columns[index].benchmark, columns[index].metric.name)):
        for part in _fitting_parts(list(same), widths, room):
            first = columns[part[0]]
            title = Text(printable(f"{first.benchmark}  {metric_title(first)}"), style="bold cyan")
            table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, leading=1)
            table.add_column("", no_wrap=True)
            for index in part:
                table.add_column(heads[index], justify="right", no_wrap=True)
            for row, measurements in enumerate(comparison.table):
                if any(measurements[index] is not None for index in part):
                    table.add_row(titles[row], *(cells[row][index] for index in part))
            yield table
    for warning in comparison.warnings:
        yield Text(f"warning: {printable(warning)}", style="yellow")
    for note in notes(comparison):
        yield Text(printable(note), style="dim")


def _terminal_cell(measurement: Measurement | None, column: Column) -> Text:
    first, *below = _cell_lines(measurement, column)
    style = _MARKS[measurement.difference.verdict][2] if measurement and measurement.difference else ""
    best = "bold" if measurement and measurement.best else ""
    return Text.assemble((first, best), *(("\n" + line, style) for line in below))


def _text_width(text: Text) -> int:
    return max(map(len, text.plain.splitlines()))


def _fitting_parts(indices: list[int], widths: Sequence[int], room: int) -> list[list[int]]:
    """Split columns into as few parts as fit, of equal length where that fits too; a single column is never cut."""
    parts: list[list[int]] = [[]]
    for index in indices:
        if parts[-1] and sum(widths[other] for other in [*parts[-1], index]) > room:
            parts.append([])
        parts[-1].append(index)
    size = -(-len(indices) // len(parts))
    even = [indices[start : start + size] for start in range(0, len(indices), size)]
    return even if all(sum(widths[index] for index in part) <= room for part in even) else parts
