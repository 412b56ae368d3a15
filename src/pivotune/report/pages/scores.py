"""Show scores with intervals, differences to the baseline, their price in English, and the language of the answers."""

from __future__ import annotations

from typing import Any

from pivotune.report.figures.scores import answer_language_figure, difference_figure, price_figure, score_figure
from pivotune.report.page import Block, Figure, Lines, Section, Table
from pivotune.report.pages.summary import comparison_table
from pivotune.report.runs import Material


def scores(material: Material) -> Section | None:
    """Return the figures of the comparison and the table of all metrics; None where no run has results."""
    if material.comparison is None:
        return None
    baseline, cells = material.comparison["baseline"], material.cells()
    caption = (
        "Every run on every task, the target language and English together. A bar is the 95 % interval over items, or the "
        "standard deviation where a point is the mean over seeds."
    )
    blocks: list[Block] = [Figure("scores", score_figure(cells).to_dict(), caption)]
    compared = [cell for cell in cells if cell["difference"]]
    if compared:
        caption = f"Difference of each run to {baseline}, item by item. A bar across zero: no difference."
        chart = difference_figure(cells, baseline).to_dict()
        blocks.append(Figure("differences", chart, caption, _differences(compared)))
    if {"en"} < {cell["language"] for cell in compared}:
        caption = (
            "Who pays for what: the gain in the target language against the gain in English. Up and right of the dashed "
            "lines is better in both."
        )
        blocks.append(Figure("price-in-english", price_figure(cells, baseline).to_dict(), caption))
    if answers := material.cells("in_language", "empty_answers", "no_marker"):
        caption = (
            "Answers in the language that was asked for, answers without any text, and English parts without marker."
        )
        blocks.append(Figure("answer-language", answer_language_figure(answers).to_dict(), caption))
    others = [cell for cell in material.comparison["cells"] if cell["metric"] != material.primary[cell["task"]]]
    if others:
        blocks.append(comparison_table(material.comparison, others, "Every other metric", folded=True))
    blocks.append(Lines(material.comparison["notes"], "note"))
    return Section("Scores", blocks)


def _differences(cells: list[Any]) -> Table:
    formats = {"value": "+.3g", "low": "+.3g", "high": "+.3g", "p": ".3g"}
    rows = []
    for cell in cells:
        found = cell["difference"]
        numbers = [None if found[key] is None else format(found[key], form) for key, form in formats.items()]
        names = [cell[key] for key in ("row", "task", "metric")]
        rows.append([*names, *numbers, found["verdict"] and str(found["verdict"]), found["covers"]])
    titles = ["run", "task", "metric", "difference", "low", "high", "p", "verdict", "interval covers"]
    return Table(titles, rows, "The differences as a table", folded=True)
