"""Show the training data of the runs, and the findings of its data check."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

import altair as alt
from markupsafe import Markup

from pivotune.report.figures.base import DASHES, WIDTH, series, stacked
from pivotune.report.figures.base import data as chart_data
from pivotune.report.page import Block, Figure, Heading, Lines, Section, Table, Text, excerpt, html
from pivotune.report.runs import DATA_CHECK, Material
from pivotune.text.words import counted

_TEXTS = {"prompt": "prompt", "completion": "answer", "prompt_en": "English prompt", "completion_en": "English answer"}
_EXCERPT = 600  # characters of a text of an example row


def data(material: Material) -> Section | None:
    """Return the findings of each data check; else the command that makes one."""
    checks = {json.dumps(run.data_check, sort_keys=True): run.data_check for run in material.runs if run.data_check}
    blocks: list[Block] = []
    for number, check in enumerate(checks.values(), start=1):
        # A page draws the data of one figure by its name.
        blocks += check_blocks(check, "data-lengths" if number == 1 else f"data-lengths-{number}")
    if checks:
        return Section("Data", blocks)
    for run in (run for run in material.runs if run.sources):
        train, language = " ".join(map(shlex.quote, run.sources)), run.language or "LANGUAGE"
        if "," in language:
            # One check is of one language.
            train, language = "FILE", "LANGUAGE"
        command = f"pivotune data check {train} --lang {language} --out {shlex.quote(str(run.path / DATA_CHECK))}"
        return Section("Data", [Text(f"The training data was not checked. {command} checks it for the next report.")])
    return None


def check_blocks(check: Mapping[str, Any], figure: str = "data-lengths") -> list[Block]:
    """Return the blocks of a data check (`DataCheck.to_dict`): verdict, kinds of faults, distributions, rows to look at."""
    total, usable = check.get("total", 0), check.get("usable", 0)
    blocks: list[Block] = [
        Text(str(check.get("verdict", "")), "lead"),
        Text(f"{check.get('source', 'data')}: {counted(total)}, {usable:,} of them usable.", "note"),
    ]
    problems = check.get("problems", [])
    if problems:
        rows = []
        for one in problems:
            kind, share = (
                "defect" if one["defect"] else "worth a look",
                f"{one['count'] / usable:.1%}" if usable else "–",
            )
            rows.append([one["title"], kind, f"{one['count']:,}", share, one["advice"]])
        titles = ["fault", "kind", "rows", "share", "what to do"]
        blocks.append(Table(titles, rows, "Kinds of faults, most serious first"))
    else:
        blocks.append(Text("No fault was found in the rows that can be used."))
    left_out = [f"{counted(count)} cannot be used: {reason}" for reason, count in (check.get("skipped") or {}).items()]
    too_long = check.get("too_long") or {}
    left_out += [f"{counted(count)} would be refused in training: {reason}" for reason, count in too_long.items()]
    left_out += [shift["message"] for shift in check.get("shifts", [])] + list(check.get("notes", []))
    if left_out:
        blocks.append(Lines(left_out, "warning"))
    if histograms := check.get("histograms"):
        caption = "Lengths of the texts, and the ratio of each text to its English."
        blocks.append(Figure(figure, _histograms(histograms).to_dict(), caption))
    lengths = check.get("lengths") or {}
    if lengths:
        rows = [
            [_TEXTS.get(name, name), *(f"{found[key]:,.0f}" for key in ("median", "p95", "max"))]
            for name, found in lengths.items()
        ]
        caption = f"Lengths in {check.get('unit', 'characters')}"
        blocks.append(Table(["text", "median", "95 %", "longest"], rows, caption, numeric=True))
    shown = [one for one in problems if one["examples"]]
    blocks += [Heading("Rows to look at")] if shown else []
    for problem in shown:
        blocks.append(html("<h4 dir='auto'>{} ({})</h4>", problem["title"], f"{problem['count']:,}"))
        blocks += [_example(finding) for finding in problem["examples"]]
    return blocks


def _example(finding: Mapping[str, Any]) -> Markup:
    """Return a row in both languages, its four texts side by side."""
    box = "<div class='answer'><h5>{}</h5><p class='text' dir='auto'>{}</p></div>"
    excerpts = {title: excerpt(finding.get(name), _EXCERPT) for name, title in _TEXTS.items()}
    texts = Markup("").join(html(box, title, text) for title, text in excerpts.items())
    head = "<p class='small' dir='auto'><strong>Row {}</strong>: {}</p>"
    return html(
        "<article>{}<div class='answers'>{}</div></article>", html(head, finding["number"], finding["note"]), texts
    )


def _histograms(histograms: Mapping[str, Any]) -> alt.VConcatChart:
    """Return bars of the lengths of each text and of the ratios to English: rows by bin."""
    panels = []
    for name, title in (("lengths", "characters"), ("ratios", "characters for each one of the English text")):
        rows = [
            {"text": _TEXTS.get(text, text), "from": low, "to": high, "rows": count}
            for text, found in histograms.get(name, {}).items()
            for low, high, count in zip(found["edges"], found["edges"][1:], found["counts"], strict=False)
        ]
        if not rows:
            continue
        encodings = series("text", [row["text"] for row in rows])
        dashes = alt.Scale(domain=encodings["color"]["scale"]["domain"], range=list(DASHES))
        chart = alt.Chart(chart_data(rows)).mark_line(interpolate="step-after", strokeWidth=1.8)
        chart = chart.encode(
            x=alt.X("from:Q", title=title, scale=alt.Scale(type="log", nice=False)),
            y=alt.Y("rows:Q", title="rows"),
            color=encodings["color"],
            strokeDash=alt.StrokeDash("text:N", legend=encodings["color"]["legend"], scale=dashes),
            tooltip=["text:N", "from:Q", "to:Q", "rows:Q"],
        )
        panels.append(chart.properties(width=WIDTH, height=150))
    return stacked(panels, "Lengths and ratios")
