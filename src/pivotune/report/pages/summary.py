"""Summarize the report: methods and data, real differences, the price in English, missing parts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from pivotune.compare.comparison import difference_digits, shown_digits
from pivotune.compare.formats import difference_text, value_text
from pivotune.compare.significance import Sample, Verdict, difference
from pivotune.errors import UsageError
from pivotune.report.page import Block, Heading, Lines, Section, Table, Text, html
from pivotune.report.runs import Material, RunParts, spread
from pivotune.results.metrics import HELDOUT_NLL
from pivotune.text.words import counted

_MARKS = {Verdict.BETTER: ("▲", "good"), Verdict.WORSE: ("▼", "bad"), Verdict.UNDECIDED: ("≈", "")}


def summary(material: Material) -> Section:
    """Return the first section; it is there for every report."""
    blocks: list[Block] = [Text(_lead(material), "lead"), _trained(material.runs)]
    if material.comparison is not None:
        cells = material.cells()
        english = [cell for cell in cells if cell["language"] == "en"]
        others = [cell for cell in cells if cell["language"] != "en"]
        blocks += [Heading("Which differences are real"), *_verdicts(material.comparison, others)]
        blocks += [Heading("What it cost in English"), *_verdicts(material.comparison, english)]
        caption = "Main metric of every task, with the difference to the baseline"
        blocks.append(comparison_table(material.comparison, cells, caption))
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
    rows = {label: [label] for label in labels}
    if len(labels) > 1 and comparison["baseline"] in labels:
        rows[comparison["baseline"]] = [f"{comparison['baseline']} (baseline)"]
    heads = []
    for task, metric in columns:
        own = {cell["row"]: cell for cell in cells if (cell["task"], cell["metric"]) == (task, metric)}
        arrow = {True: " ↑", False: " ↓"}.get(next(iter(own.values()))["higher_is_better"], "")
        heads.append(html("{}<br>{}", task, metric + arrow))
        digits = shown_digits(map(spread, own.values()), 3)
        for label in labels:
            rows[label].append(_cell(own.get(label), digits, _difference_digits(own.values(), digits)))
    return Table(["", *heads], list(rows.values()), caption, numeric=True, folded=folded)


def _lead(material: Material) -> str:
    runs = material.runs
    trained = [run for run in runs if run.config]
    if not trained:
        return f"{counted(len(runs), 'model')} without a configuration: nothing is known of how they were trained."
    models = ", ".join(dict.fromkeys(str(run.config.get("model")) for run in trained))
    codes = dict.fromkeys(code for run in trained for code in run.language.split(", ") if code)
    languages = ", ".join(codes) or "an unnamed language"
    methods = ", ".join(dict.fromkeys(str(run.config.get("method")) for run in trained))
    return f"{counted(len(trained), 'run')} of {models}, fine-tuned for {languages} with {methods}."


def _trained(runs: Sequence[RunParts]) -> Table:
    rows = []
    for run in runs:
        config = run.config
        layers = "–"
        if run.layers:
            terms = {"i": "conversion", "j": "thinking"}
            used = [k for k, term in terms.items() if config.get(f"supervision.{term}.signal") != "none"]
            named = ", ".join(f"{k} = {run.layers[terms[k]]}" for k in used)
            layers = f"{named} of {run.layers['num_layers']}"
        tokens = sum(count for line in run.metrics if isinstance(count := line.get("trained_tokens"), int))
        values = (config.get("model"), config.get("method"), ", ".join(run.sources), run.language, config.get("seed"))
        texts = [None if value in (None, "") else str(value) for value in values]
        rows.append([run.name, *texts, run.steps, f"{tokens:,}" if tokens else None, layers])
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
            text += f"{_difference_text(cell, _difference_digits([cell]))} {cell['metric']}"
            lines.append(html("<span class='{}'>{}</span> {}", kind, mark, text))
    undecided = sum(cell["difference"]["verdict"] == Verdict.UNDECIDED for cell in compared)
    if undecided:
        lines.append(f"≈ {undecided} of {counted(len(compared), 'difference')} cannot be told apart from zero.")
    blocks: list[Block] = [Lines(lines)]
    if any(not cell["difference"]["num_seeds"] for cell in compared):
        covers = "One run stands against one: the intervals cover the items, not the noise between two trainings."
        blocks.append(Text(covers, "note"))
    return blocks


def _changes(run: RunParts) -> list[list[Any]]:
    """Return a row for each language whose held-out items were scored before and after, with the paired interval."""
    rows = []
    heldout = {name: entry for name, entry in run.entries.items() if isinstance(entry.get("base"), dict)}
    after: dict[str, dict[str, Any]] = {name: {} for name in heldout}
    for record in run.items() if heldout else ():
        if record["task"] in heldout:
            after[record["task"]][str(record["item"])] = record
    for task, entry in heldout.items():
        before, now = entry["base"].get("value"), entry.get("value")
        if before is None or now is None:
            continue
        items = after[task]
        started = {
            item: {"nll": record.get("base_nll"), "tokens": record.get("tokens")} for item, record in items.items()
        }
        kind = mark = ""
        try:
            found = difference(HELDOUT_NLL, [Sample(items)], [Sample(started)])
            text = difference_text(now - before, found.low, found.high, 3)
            if math.isfinite(found.low):
                mark, kind = _MARKS[found.verdict or Verdict.UNDECIDED]
        except UsageError:
            text = f"{now - before:+.3f} (no items: no interval)"
        verdict = html("<span class='{}'>{}</span>", kind, mark)
        rows.append([run.name, entry.get("language") or task, f"{before:.3f}", f"{now:.3f}", text, verdict])
    return rows


def _difference_text(cell: Mapping[str, Any], digits: int) -> str:
    found = cell["difference"]
    return difference_text(found["value"], found["low"], found["high"], digits)


def _difference_digits(cells: Iterable[Mapping[str, Any]], otherwise: int = 3) -> int:
    found = [cell["difference"] for cell in cells if cell["difference"] and cell["difference"]["low"] is not None]
    return difference_digits(((one["low"], one["high"], one["verdict"]) for one in found), otherwise)


def _cell(cell: Mapping[str, Any] | None, digits: int, difference_digits: int) -> Markup | None:
    if cell is None or cell["value"] is None:
        return None
    text = html("<strong>{}</strong>" if cell["best"] else "{}", value_text(cell["value"], spread(cell), digits))
    if found := cell["difference"]:
        mark, kind = _MARKS.get(found["verdict"], ("", ""))
        text += html(
            "<br><span class='{}'>{} {}</span>", kind or "note", _difference_text(cell, difference_digits), mark
        )
    return text
