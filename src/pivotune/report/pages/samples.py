"""Sample answers of all runs side by side, with search and filters (`samples.js` draws them)."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from pivotune.report.page import Section, Text, excerpt
from pivotune.report.runs import Material

LONGEST_TEXT = 2000  # characters of a question or an answer in the page; the result files hold all
MOST_ITEMS = 500  # of a task; the first ones of the files
_PLACES = Markup(
    "<div id='sample-controls' class='controls'></div><p id='sample-count' class='note' role='status'></p>"
    "<div id='sample-list'></div>"
)


def samples(material: Material) -> Section | None:
    """Return the answers of every generating or choosing task, joined by item; None where no run kept texts."""
    runs = [run for run in material.runs if run.entries]
    tasks: dict[str, dict[str, list[Any]]] = {}
    cut = False
    for index, run in enumerate(runs):
        for record in run.items():
            if "answer" not in record:
                continue
            task, item = str(record["task"]), str(record["item"])
            items = tasks.setdefault(task, {})
            if item not in items:
                if len(items) >= MOST_ITEMS:
                    cut = True
                    continue
                asked, gold = (excerpt(record.get(key), LONGEST_TEXT) for key in ("question", "gold"))
                items[item] = [item, asked, gold, [None] * len(runs)]
            score = _score(record, material.primary.get(task))
            flags = (record.get("in_language") == 0) + 2 * (not str(record["answer"]).strip())
            items[item][3][index] = [excerpt(record["answer"], LONGEST_TEXT), score, flags]
    if not tasks:
        return None
    content = {
        "runs": [run.name for run in runs],
        "tasks": {name: list(items.values()) for name, items in tasks.items()},
    }
    note = "What each model answered to the same questions."
    if cut:
        note += f" The first {MOST_ITEMS} questions of each task are shown; the result files hold all."
    return Section("Sample answers", [Text(note), _PLACES], {"samples": content})


def _score(record: Any, metric: str | None) -> float | None:
    """Return the item's number behind the task's main metric, or whether it is correct."""
    value = record.get(metric, record.get("correct"))
    return round(float(value), 3) if isinstance(value, (int, float)) else None
