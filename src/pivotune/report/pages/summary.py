"""Summarize the report: methods and data, real differences, the price in English, missing parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from pivotune.compare.significance import Sample, Verdict, difference
from pivotune.errors import UsageError
from pivotune.report.page import Block, Heading, Lines, Section, Table, Text, html
from pivotune.report.runs import Material, RunParts
from pivotune.results.metrics import Metric

_MARKS = {Verdict.BETTER: ("▲", "good"), Verdict.WORSE: ("▼", "bad"), Verdict.UNDECIDED: ("≈", "")}
_HELDOUT = Metric("nll", "ratio", ("nll", "tokens"), higher_is_better=False)
_BEFORE = Metric("nll", "ratio", ("base_nll", "tokens"), higher_is_better=False)


def summary(material: Material) -> Section:
    """Return the first section; it is there for every report."""
    blocks: list[Block] = [Text(_lead(material), "lead"), _trained(material.runs)]
    if material.comparison is not None:
        cells = material.cells()
        english = [cell for cell in cells if cell["language"] == "en"]
        others = [cell for cell in cells if cell["language"] != "en"]
        blocks += [Heading("Which differences are real"), *_verdicts(material.comparison, others)]
        blocks += [Heading("What it cost in English"), *_verdicts(material.comparison, english)]
        blocks.append(
            comparison_table(
                material.comparison, cells, "Main metric of every task, with the difference to the baseline"
            )
        )
    changes = [row for run in material.runs for row in _changes(run)]
    if changes:
        titles = ["run", "language", "before", "after", "change", ""]
        caption = (
            "Held-out answers: negative log-likelihood in nats per token, before and after training (lower is better)"
        )
        blocks += [Heading("Against the starting model"), Table(titles, changes, caption)]
    if material.warnings:
        blocks += [Heading("What makes figures less comparable"), Lines(material.warnings, "warning")]
    missing = [f"{run.name}: {line}" for run in material.runs for line in run.missing]
    if missing:
        blocks += [Heading("What is missing"), Lines(missing, "warning")]
    return Section("Summary", blocks)


def comparison_table(
    comparison: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], caption: str, *, folded: bool = False
) -> Table:
    """Return rows by columns of a comparison: values, best in bold, and differences with their verdicts."""
    columns = list(dict.fromkeys((cell["task"], cell["metric"]) for cell in cells))
    labels = dict.fromkeys(cell["row"] for cell in cells)
    by_place = {(cell["row"], cell["task"], cell["metric"]): cell for cell in cells}
    rows = []
    for label in labels:
        title = f"{label} (baseline)" if label == comparison["baseline"] and len(labels) > 1 else label
        rows.append([title, *(_cell(by_place.get((label, *column))) for column in columns)])
    heads = []
    for task, metric in columns:
        arrow = {True: " ↑", False: " ↓"}.get(
            next(c["higher_is_better"] for c in cells if (c["task"], c["metric"]) == (task, metric)), ""
        )
        heads.append(html("{}<br>{}", task, metric + arrow))
    return Table(["", *heads], rows, caption, numeric=True, folded=folded)


def _lead(material: Material) -> str:
    runs = material.runs
    trained = [run for run in runs if run.config]
    if not trained:
        return f"{_count(len(runs), 'model')} without a configuration: nothing is known of how they were trained."
    models = ", ".join(dict.fromkeys(str(run.config.get("model")) for run in trained))
    languages = (
        ", ".join(dict.fromkeys(code for run in trained for code in run.language.split(", ") if code))
        or "an unnamed language"
    )
    methods = ", ".join(dict.fromkeys(str(run.config.get("method")) for run in trained))
    return f"{_count(len(trained), 'run')} of {models}, fine-tuned for {languages} with {methods}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _trained(runs: Sequence[RunParts]) -> Table:
    rows = []
    for run in runs:
        config = run.config
        layers = "–"
        if run.layers:
            terms = {"i": "conversion", "j": "thinking"}
            used = {k: term for k, term in terms.items() if config.get(f"supervision.{term}.signal") != "none"}
            layers = (
                ", ".join(f"{k} = {run.layers[term]}" for k, term in used.items()) + f" of {run.layers['num_layers']}"
            )
        steps = max((line["step"] for line in run.metrics if isinstance(line.get("step"), int)), default=None)
        tokens = sum(count for line in run.metrics if isinstance(count := line.get("trained_tokens"), int))
        values = (config.get("model"), config.get("method"), ", ".join(run.sources), run.language, config.get("seed"))
        texts = [None if value in (None, "") else str(value) for value in values]
        rows.append([run.name, *texts, steps, f"{tokens:,}" if tokens else None, layers])
    titles = ["run", "starting model", "method", "training rows", "language", "seed", "steps", "tokens", "layers"]
    return Table(titles, rows, "What was trained on what")


def _verdicts(comparison: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Return one line for each run that is better or worse than the baseline somewhere, and one on the rest."""
    if not cells:
        return [Text("Not measured: no run has such a task.")]
    compared = [cell for cell in cells if cell["difference"] and cell["difference"]["verdict"]]
    if not compared:
        return [Text("Nothing to compare: a difference needs two runs with the same task and their items.")]
    lines = []
    for verdict in (Verdict.BETTER, Verdict.WORSE):
        for cell in (cell for cell in compared if cell["difference"]["verdict"] == verdict):
            mark, kind = _MARKS[verdict]
            text = f"{cell['row']} is {verdict} than {comparison['baseline']} on {cell['task']}: "
            lines.append(
                html("<span class='{}'>{}</span> {}{} {}", kind, mark, text, _difference_text(cell), cell["metric"])
            )
    undecided = sum(cell["difference"]["verdict"] == Verdict.UNDECIDED for cell in compared)
    if undecided:
        lines.append(f"≈ {undecided} of {_count(len(compared), 'difference')} cannot be told apart from zero.")
    blocks: list[Block] = [Lines(lines)]
    if any(not cell["difference"]["num_seeds"] for cell in compared):
        blocks.append(
            Text(
                "One run stands against one: the intervals cover the items, not the noise between two trainings.",
                "note",
            )
        )
    return blocks


def _changes(run: RunParts) -> list[list[Any]]:
    """Return a row for each language whose held-out items were scored before and after, with the paired interval."""
    rows = []
    after: dict[str, dict[str, Any]] = {}
    heldout = [name for name, entry in run.entries.items() if isinstance(entry.get("base"), dict)]
    if not heldout:
        return []
    for record in run.items():
        if record["task"] in heldout:
            after.setdefault(str(record["task"]), {})[str(record["item"])] = record
    for task in heldout:
        entry = run.entries[task]
        before, now = entry["base"].get("value"), entry.get("value")
        if before is None or now is None:
            continue
        items = after.get(task, {})
        started = {
            item: {"nll": record.get("base_nll"), "tokens": record.get("tokens")} for item, record in items.items()
        }
        text, kind, mark = f"{now - before:+.3f}", "", ""
        try:
            found = difference(_HELDOUT, [Sample(items)], [Sample(started)])
            if math.isfinite(found.low):
                text += f" [{found.low:+.3f}, {found.high:+.3f}]"
                mark, kind = _MARKS.get(found.verdict or Verdict.UNDECIDED, ("", ""))
        except UsageError:
            text += " (no items: no interval)"
        verdict = html("<span class='{}'>{}</span>", kind, mark)
        rows.append([run.name, entry.get("language") or task, f"{before:.3f}", f"{now:.3f}", text, verdict])
    return rows


def _difference_text(cell: Mapping[str, Any]) -> str:
    found, digits = cell["difference"], _digits(cell)
    text = f"{found['value']:+.{digits}f}"
    if found["low"] is not None:
        text += f" [{found['low']:+.{digits}f}, {found['high']:+.{digits}f}]"
    return text


def _digits(cell: Mapping[str, Any]) -> int:
    return 2 if abs(cell["value"] or 0) >= 10 else 3


def _cell(cell: Mapping[str, Any] | None) -> Markup | None:
    if cell is None or cell["value"] is None:
        return None
    spread = cell["stderr"] if cell["seed_sd"] is None else cell["seed_sd"]
    digits = _digits(cell)
    value = f"{cell['value']:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")
    text = html("<strong>{}</strong>" if cell["best"] else "{}", value)
    if found := cell["difference"]:
        mark, kind = _MARKS.get(found["verdict"], ("", ""))
        text += html("<br><span class='{}'>{} {}</span>", kind or "note", _difference_text(cell), mark)
    return text
