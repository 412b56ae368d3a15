"""Figures of scores: values with intervals, differences, answer language, and the gain against the price in English."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from pivotune.report.figures.base import WIDTH, around, data, intervals, metric_label, series, short_name, stacked
from pivotune.results.metrics import ERRORS_OF_95

Cells = Sequence[Mapping[str, Any]]  # of `pivotune.compare.formats.to_dict`
_ROW = 26  # pixels of a row of points
_ROOM = alt.Scale(padding=12)  # no interval ends at the border of its panel


def score_figure(cells: Cells) -> alt.VConcatChart:
    """Return every run's value with its 95 % interval, a panel for each benchmark and metric.

    The languages of a benchmark, English among them, stand in one panel.

    The interval is over items; over seeds, which are a mean, it is the standard deviation on either side.
    """
    panels = []
    names = [short_name(cell["row"]) for cell in cells]
    for benchmark, metric in dict.fromkeys((cell["benchmark"], cell["metric"]) for cell in cells):
        own = [cell for cell in cells if (cell["benchmark"], cell["metric"]) == (benchmark, metric)]
        rows = [_score_row(cell) for cell in own if cell["value"] is not None]
        if not rows:
            continue
        better = {True: " (higher is better)", False: " (lower is better)"}.get(own[0]["higher_is_better"], "")
        x = alt.X("value:Q", title=metric_label(metric) + better, scale=alt.Scale(zero=False, padding=8))
        panels.append(_by_task(rows, x, names).properties(title=benchmark))
    return stacked(panels, "Scores", "95 % interval over items; standard deviation where a mean is over seeds")


def difference_figure(cells: Cells, baseline: str) -> alt.VConcatChart:
    """Return the paired differences to the baseline with their 95 % intervals; a filled point's excludes zero."""
    rows = [
        {
            "task": cell["task"],
            "metric": cell["metric"],
            "run": short_name(cell["row"]),
            "difference": found["value"],
            "low": found["low"],
            "high": found["high"],
            "verdict": str(found["verdict"] or "no better direction"),
        }
        for cell in cells
        if (found := cell["difference"])
    ]
    panels = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        own = [row for row in rows if row["metric"] == metric]
        x = alt.X("difference:Q", title=f"{metric_label(metric)}: difference to {short_name(baseline)}", scale=_ROOM)
        panels.append(_by_task(own, x, [row["run"] for row in rows]) + _zero("x"))
    return stacked(panels, "Differences", "paired, with 95 % intervals")


def price_figure(cells: Cells, baseline: str) -> alt.VConcatChart:
    """Return the gain in the target language against the gain in English, one point a run and benchmark.

    Both are differences to the baseline, turned so that better is up and right.
    """
    found: dict[tuple[str, str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for cell in cells:
        if cell["difference"] and cell["higher_is_better"] is not None:
            sides = found.setdefault((cell["row"], cell["benchmark"], cell["metric"]), {"en": [], "target": []})
            sides["en" if cell["language"] == "en" else "target"].append(cell)
    rows = []
    for (run, benchmark, metric), sides in found.items():
        for english in sides["en"]:
            for target in sides["target"]:
                x, y = _turned(english), _turned(target)
                row = {"run": short_name(run), "benchmark": benchmark, "metric": metric, "language": target["language"]}
                rows.append(
                    {**row, "english": x[0], "low": x[1], "high": x[2], "target": y[0], "below": y[1], "above": y[2]}
                )
    panels = []
    for benchmark, metric in dict.fromkeys((row["benchmark"], row["metric"]) for row in rows):
        own = [row for row in rows if (row["benchmark"], row["metric"]) == (benchmark, metric)]
        x = alt.X("english:Q", title=f"gain in English, {metric_label(metric)} (right: better)", scale=_ROOM)
        y = alt.Y("target:Q", title=["gain in the target", "language (up: better)"], scale=_ROOM)
        encodings = series("run", [row["run"] for row in rows])
        panel = intervals(own, x, y, encodings, 240)
        upright = alt.Chart(data(own)).mark_rule(strokeWidth=1.6)
        panel += upright.encode(
            x=x, y=alt.Y("below:Q", title=y["title"], scale=_ROOM), y2="above:Q", color=encodings["color"]
        )
        panels.append((panel + _zero("x") + _zero("y")).properties(title=benchmark))
    return stacked(
        panels, "Gain in the target language against the price in English", f"differences to {short_name(baseline)}"
    )


def answer_language_figure(cells: Cells) -> alt.VConcatChart:
    """Return the share of answers in the asked-for language, and of empty ones, by task and run."""
    labels = {"in_language": "answers in the asked-for language (%)", "empty_answers": "empty answers (%)"}
    labels |= {"no_marker": "English parts without the marker of the second part (%)"}
    panels = []
    for metric, label in labels.items():
        rows = [_score_row(cell) for cell in cells if cell["metric"] == metric and cell["value"] is not None]
        if not rows:
            continue
        for row in (row for row in rows if row["low"] is not None):
            # The interval of a share is cut at its bounds.
            row |= {"low": max(row["low"], 0), "high": min(row["high"], 100)}
        x = alt.X("value:Q", title=label, scale=alt.Scale(domain=[0, 100]))
        panels.append(_by_task(rows, x, [row["run"] for row in rows]))
    return stacked(panels, "Language of the answers", "95 % interval over items")


def heldout_figure(
    results: Mapping[str, Mapping[str, float | None]],
    *,
    errors: Mapping[str, Mapping[str, float | None]] | None = None,
    differences: Mapping[str, Mapping[str, float | None]] | None = None,
    difference: str = "difference",
) -> alt.VConcatChart:
    """Return held-out NLL as grouped bars: a group for each language, a bar in it for each method, its value above it.

    `results` and their standard `errors` (drawn as 95 % intervals) are by method, then language. A second panel, named
    `difference`, shows paired `differences`: language -> `value`, `low`, `high`.
    """
    rows = []
    for method, values in results.items():
        for language, value in values.items():
            error = (errors or {}).get(method, {}).get(language)
            span = around(value, None if error is None else ERRORS_OF_95 * error)
            row = {"run": short_name(method), "language": language, "nll": value, **span}
            top = value if span["high"] is None else span["high"]
            rows.append({**row, "label": "n/a" if value is None else f"{value:.2f}", "top": top or 0})
    asked, upright = "language of question and answer", alt.Axis(labelAngle=0)
    x = alt.X("language:N", title=None if differences else asked, sort=None, axis=upright)
    base = alt.Chart(data(rows)).encode(x=x, xOffset=alt.XOffset("run:N", sort=None))
    nll = "held-out answer NLL (nats per token)"
    colour = series("run", [row["run"] for row in rows])["color"]
    bars = base.mark_bar().encode(y=alt.Y("nll:Q", title=nll), color=colour, tooltip=["run:N", "language:N", "nll:Q"])
    spans = base.mark_rule().encode(y=alt.Y("low:Q", title=nll), y2="high:Q")
    labels = base.mark_text(dy=-8).encode(y=alt.Y("top:Q", title=nll), text="label:N")
    panels = [alt.layer(bars, spans, labels).properties(width=WIDTH, height=260)]
    if differences:
        points = []
        for language, found in differences.items():
            label = "n/a" if found["value"] is None else f"{found['value']:+.3f}"
            points.append({"language": language, **found, "label": label})
        x = alt.X("language:N", title=asked, sort=None, axis=upright, scale=alt.Scale(type="band"))
        y = alt.Y("value:Q", title=[*difference.split("\n"), "(paired, 95 %)"], scale=_ROOM)
        one = {"color": alt.value("currentColor"), "shape": alt.value("circle")}
        panel = intervals(points, x, y, one, 130, "y") + _zero("y")
        panel += alt.Chart(data(points)).mark_text(align="left", dx=8).encode(x=x, y=y, text="label:N")
        panels.append(panel)
    return stacked(panels, "Held-out answers (lower is better)", "bars: 95 % interval of the mean" if errors else "")


def _score_row(cell: Mapping[str, Any]) -> dict[str, Any]:
    margin = cell["seed_sd"]
    if margin is None and cell["stderr"] is not None:
        margin = ERRORS_OF_95 * cell["stderr"]
    row = {"task": cell["task"], "language": cell["language"], "metric": cell["metric"], "run": short_name(cell["row"])}
    return {**row, "value": cell["value"], **around(cell["value"], margin), "items": cell["n"]}


def _by_task(rows: Sequence[Mapping[str, Any]], x: alt.X, names: Sequence[str]) -> Any:
    """Return intervals in a row for each task, its runs (all of them are `names`) below each other."""
    runs = list(dict.fromkeys(names))
    y = alt.Y("task:N", title=None, sort=None, axis=alt.Axis(grid=True))
    height = len({row["task"] for row in rows}) * max(_ROW, 13 * len({row["run"] for row in rows}))
    return intervals(rows, x, y, {**series("run", runs), "yOffset": alt.YOffset("run:N", sort=runs)}, height)


def _zero(axis: str) -> alt.Chart:
    return alt.Chart(data([{"zero": 0}])).mark_rule(strokeDash=[4, 3]).encode(**{axis: "zero:Q"})


def _turned(cell: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
    """Return value, low and high of a difference, turned so that a better value is larger."""
    value, low, high = (cell["difference"][key] for key in ("value", "low", "high"))
    if cell["higher_is_better"]:
        return value, low, high
    return -value, None if high is None else -high, None if low is None else -low
