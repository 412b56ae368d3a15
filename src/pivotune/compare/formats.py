"""A comparison as Markdown, LaTeX, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from itertools import groupby
from typing import Any

from pivotune.compare.comparison import Cell, Column, Comparison
from pivotune.compare.significance import CONFIDENCE, Difference, Verdict
from pivotune.text.escaping import csv_text, latex, markdown, one_line
from pivotune.text.files import finite

FORMATS = {".md": "markdown", ".tex": "latex", ".csv": "csv", ".json": "json"}
MARKS = {Verdict.BETTER: "▲", Verdict.WORSE: "▼", Verdict.UNDECIDED: "≈"}
LEGEND = "▲ better, ▼ worse, ≈ not told apart."
NOTHING = "–"
ARROWS = {True: "↑", False: "↓", None: ""}

_CSV_FIELDS: tuple[str, ...] = (
    "row", "kind", "method", "seeds", "path", "task", "benchmark", "language", "metric", "higher_is_better", "value",
    "stderr", "seed_sd", "n", "best", "baseline", "difference", "low", "high", "p", "adjusted_p", "n_shared",
    "seed_test", "seed_t", "seed_degrees", "seed_p", "verdict",
)  # fmt: skip
_LATEX_MARKS = {Verdict.BETTER: "^{+}", Verdict.WORSE: "^{-}", Verdict.UNDECIDED: ""}
_LATEX_LEGEND = "$^{+}$ better, $^{-}$ worse; no mark: not told apart."
_LATEX_ARROWS = {True: r" $\uparrow$", False: r" $\downarrow$", None: ""}


def render(comparison: Comparison, form: str) -> str:
    """The whole text of a file.

    Args:
        form: one of the values of `FORMATS`.
    """
    if form == "json":
        return json.dumps(to_dict(comparison), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    return {"markdown": to_markdown, "latex": to_latex, "csv": to_csv}[form](comparison)


def value_text(cell: Cell | None, column: Column) -> str:
    """`29.65 ± 1.20`; a dash where there is no value."""
    if cell is None or cell.value is None:
        return NOTHING
    value = _number(cell.value, column.digits)
    return value if cell.spread is None else f"{value} ± {cell.spread:.{column.digits}f}"


def difference_text(found: Difference, column: Column) -> str:
    """`+2.31 [0.21, 4.40]`, without the interval where there is none."""
    value = _number(found.value, column.digits, "+")
    if not math.isfinite(found.low):
        return value
    return f"{value} [{_number(found.low, column.digits)}, {_number(found.high, column.digits)}]"


def seed_text(found: Difference) -> str:
    """The t-test over seeds; empty where there is none."""
    if found.seed_test is None:
        return ""
    p = found.seed_test.p
    return "seeds p < 0.001" if p < 0.001 else f"seeds p {p:.3f}"


def row_facts(comparison: Comparison, index: int) -> str:
    """`baseline, 3 seeds`; empty where there is nothing to say."""
    runs = len(comparison.rows[index].runs)
    facts = ["baseline"] if index == comparison.baseline and len(comparison.rows) > 1 else []
    return ", ".join([*facts, *([f"{runs} seeds"] if runs > 1 else [])])


def row_title(comparison: Comparison, index: int) -> str:
    """`tft (baseline, 3 seeds)`."""
    label, facts = comparison.rows[index].label, row_facts(comparison, index)
    return f"{label} ({facts})" if facts else label


def metric_title(column: Column) -> str:
    """`f1 ↑`."""
    return f"{column.metric.name} {ARROWS[column.metric.higher_is_better]}".strip()


def column_count(comparison: Comparison, index: int) -> str:
    """`n 1190`, or `n 40-1190` where the rows have different numbers of items."""
    counts = [line[index].n for line in comparison.cells if line[index] is not None]  # type: ignore[union-attr]
    low, high = min(counts), max(counts)
    return f"n {low}" if low == high else f"n {low}-{high}"


def notes(comparison: Comparison, legend: str = LEGEND) -> list[str]:
    """The comparison's notes, with what the marks mean where there are any."""
    verdicts = [
        cell for line in comparison.cells for cell in line if cell and cell.difference and cell.difference.verdict
    ]
    return [*comparison.notes[:1], *([legend] if verdicts else []), *comparison.notes[1:]]


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """Everything, as plain data; what is undefined is None."""
    return {
        "baseline": comparison.rows[comparison.baseline].label,
        "resamples": comparison.resamples,
        "seed": comparison.seed,
        "confidence": CONFIDENCE / 100,
        "rows": [
            {
                "label": row.label,
                "method": row.method,
                "seeds": row.seeds,
                "paths": [str(run.results.path) for run in row.runs],
            }
            for row in comparison.rows
        ],
        "cells": [
            {"row": comparison.rows[index].label, **_column_dict(column), **_cell_dict(cell)}
            for index, line in enumerate(comparison.cells)
            for column, cell in zip(comparison.columns, line, strict=True)
            if cell is not None
        ],
        "warnings": list(comparison.warnings),
        "notes": list(comparison.notes),
    }


def to_csv(comparison: Comparison) -> str:
    """One line per row, task and metric; `kind` is `run`, or `seeds` for a mean that lines of kind `seed` follow."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _CSV_FIELDS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for index, line in enumerate(comparison.cells):
        for column, cell in zip(comparison.columns, line, strict=True):
            if cell is not None:
                lines = _csv_lines(comparison, index, column, cell)
                writer.writerows({key: csv_text(value) for key, value in line.items()} for line in lines)
    return buffer.getvalue()


def to_markdown(comparison: Comparison) -> str:
    """One table, differences on a line of their own within the cells."""
    heads = ["method"] + [
        f"{markdown(f'{column.benchmark} {column.short_name}')}<br>{markdown(metric_title(column))}, "
        f"{column_count(comparison, index)}"
        for index, column in enumerate(comparison.columns)
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * len(comparison.columns) + "|"]
    for index, cells in enumerate(comparison.cells):
        texts = [_markdown_cell(cell, column) for cell, column in zip(cells, comparison.columns, strict=True)]
        lines.append(f"| {' | '.join([markdown(row_title(comparison, index)), *texts])} |")
    below = [*(f"**Warning:** {markdown(line)}" for line in comparison.warnings), *map(markdown, notes(comparison))]
    return "\n".join(lines) + "\n\n" + "\n\n".join(below) + "\n"


def to_latex(comparison: Comparison) -> str:
    """A `table` for the package booktabs; each method's differences stand below its values."""
    columns = comparison.columns
    groups = [(title, len(list(same))) for title, same in groupby(columns, _latex_group)]
    rules, start = [], 2
    for _, width in groups:
        rules.append(rf"\cmidrule(lr){{{start}-{start + width - 1}}}")
        start += width
    lines = [f"% warning: {one_line(warning)}" for warning in comparison.warnings]
    lines += ["% needs \\usepackage{booktabs}", r"\begin{table}", r"\centering", r"\small"]
    lines += [rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule"]
    lines += [" & ".join(["", *(rf"\multicolumn{{{width}}}{{c}}{{{title}}}" for title, width in groups)]) + r" \\"]
    lines += [" ".join(rules), " & ".join(["method", *(latex(column.short_name) for column in columns)]) + r" \\"]
    lines += [" & ".join(["", *(column_count(comparison, i).replace("-", "--") for i in range(len(columns)))]) + r" \\"]
    for index in range(len(comparison.rows)):
        lines += [r"\addlinespace" if index else r"\midrule", *_latex_row(comparison, index)]
    caption = " ".join([*map(latex, comparison.notes[:1]), _LATEX_LEGEND, *map(latex, comparison.notes[1:])])
    lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{caption}}}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _number(value: float, digits: int, sign: str = "") -> str:
    """Without the sign of a zero that only rounding made."""
    text = f"{value:{sign}.{digits}f}"
    return f"{0:{sign}.{digits}f}" if float(text) == 0 else text


def _column_dict(column: Column) -> dict[str, Any]:
    return {
        "task": column.task,
        "benchmark": column.benchmark,
        "language": column.language,
        "metric": column.metric.name,
        "higher_is_better": column.metric.higher_is_better,
    }


def _cell_dict(cell: Cell) -> dict[str, Any]:
    several = len(cell.by_run) > 1
    return {
        "value": cell.value,
        "stderr": None if several else cell.spread,
        "seed_sd": cell.spread if several else None,
        "n": cell.n,
        "best": cell.best,
        "runs": [
            {
                "path": str(run.results.path),
                "seed": run.seed,
                "value": figure.value,
                "stderr": figure.stderr,
                "n": figure.n,
            }
            for run, figure in cell.by_run
        ],
        "difference": None if cell.difference is None else _difference_dict(cell.difference),
    }


def _difference_dict(found: Difference) -> dict[str, Any]:
    test = found.seed_test
    return {
        "value": found.value,
        "low": finite(found.low),
        "high": finite(found.high),
        "p": finite(found.p),
        "adjusted_p": found.adjusted_p,
        "n": found.n,
        "covers": "items and seeds" if found.num_seeds else "items",
        "num_seeds": found.num_seeds,
        "seed_test": None if test is None else {"kind": test.kind, "t": test.t, "degrees": test.degrees, "p": test.p},
        "verdict": None if found.verdict is None else str(found.verdict),
    }


def _csv_lines(comparison: Comparison, index: int, column: Column, cell: Cell) -> list[dict[str, Any]]:
    row = comparison.rows[index]
    about = {"row": row.label, "method": row.method, **_column_dict(column)}
    content = _cell_dict(cell)
    runs = content.pop("runs")
    found = content.pop("difference") or {}
    test = found.get("seed_test") or {}
    line = {
        **about,
        **content,
        "kind": "run" if len(runs) == 1 else "seeds",
        "seeds": " ".join(str(run["seed"]) for run in runs if run["seed"] is not None),
        "path": runs[0]["path"] if len(runs) == 1 else "",
        "baseline": comparison.rows[comparison.baseline].label,
        "difference": found.get("value"),
        **{key: found.get(key) for key in ("low", "high", "p", "adjusted_p", "verdict")},
        "n_shared": found.get("n"),
        "seed_test": test.get("kind"),
        **{f"seed_{key}": test.get(key) for key in ("t", "degrees", "p")},
    }
    if len(runs) == 1:
        return [line]
    return [line, *({**about, **run, "seeds": run["seed"], "kind": "seed"} for run in runs)]


def _markdown_cell(cell: Cell | None, column: Column) -> str:
    text = value_text(cell, column)
    if cell is None:
        return text
    text = f"**{text}**" if cell.best else text
    found = cell.difference
    if found is None:
        return text
    mark = f" {MARKS[found.verdict]}" if found.verdict else ""
    return "<br>".join(part for part in (text, f"{difference_text(found, column)}{mark}", seed_text(found)) if part)


def _latex_group(column: Column) -> str:
    arrow = _LATEX_ARROWS[column.metric.higher_is_better]
    return f"{latex(column.benchmark)} ({latex(column.metric.name)}{arrow})"


def _latex_row(comparison: Comparison, index: int) -> list[str]:
    """The values, below them the differences, below those the tests over seeds; only the lines that say something."""
    cells = list(zip(comparison.cells[index], comparison.columns, strict=True))
    found = [(cell.difference if cell else None, column) for cell, column in cells]
    lines = [
        [latex(row_title(comparison, index)), *(_latex_value(cell, column) for cell, column in cells)],
        ["", *(_latex_difference(difference, column) for difference, column in found)],
        ["", *(_latex_small(latex(seed_text(difference))) if difference else "" for difference, _ in found)],
    ]
    return [" & ".join(line) + r" \\" for line in lines if any(line)]


def _latex_value(cell: Cell | None, column: Column) -> str:
    text = latex(value_text(cell, column))
    return rf"\textbf{{{text}}}" if cell is not None and cell.best else text


def _latex_difference(found: Difference | None, column: Column) -> str:
    if found is None:
        return ""
    mark = _LATEX_MARKS[found.verdict] if found.verdict else ""
    # In mathematics a hyphen is a minus, and a space needs a tilde.
    return _latex_small(f"${difference_text(found, column).replace(' ', '~')}{mark}$")


def _latex_small(text: str) -> str:
    return rf"{{\footnotesize {text}}}" if text else ""
