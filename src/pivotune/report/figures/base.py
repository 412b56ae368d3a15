"""Parts of every figure: colours, shapes, fonts, labelled layers, and files.

A figure is an Altair chart from plain dictionaries as they stand in the result files. The same chart is written as PNG, SVG
or PDF and drawn in the page, where text and black marks take the page's colour (`currentColor`).

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; every series also differs in shape and
dashes. Missing values (null) leave a gap.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from pivotune.errors import UsageError
from pivotune.report.page import shown
from pivotune.text.files import finite, write_bytes

Row = Mapping[str, Any]
FORMATS = (".png", ".svg", ".pdf")

# Without the yellow that vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "currentColor")
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
WIDTH = 640  # pixels of a panel; `page.js` scales it to the page
SCALE = 2  # pixels of a PNG for each of a chart's
MOST_POINTS = 45  # on a line; more would hide it
LONGEST_LABEL = 30  # characters of a model name
# Fonts with the scripts of the data, where they are installed; every renderer takes missing letters from others.
FONTS = '"Noto Sans", "DejaVu Sans", "Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans CJK SC", sans-serif'
METRIC_LABELS = {"f1": "F1", "nll": "held-out answer NLL (nats per token)", "bleu": "BLEU", "chrf++": "chrF++"}

_TEXT = {"labelColor": "currentColor", "titleColor": "currentColor", "labelFontSize": 12, "titleFontSize": 12}
_CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": FONTS,
    "view": {"stroke": None},
    "axis": {
        **_TEXT,
        "titleFontWeight": "normal",
        "domainColor": "currentColor",
        "domainOpacity": 0.5,
        "tickColor": "currentColor",
        "tickOpacity": 0.5,
        "gridColor": "currentColor",
        "gridOpacity": 0.13,
        "labelLimit": 260,
    },
    "axisX": {"labelOverlap": True, "labelSeparation": 6},
    "legend": {
        **_TEXT, "orient": "top", "direction": "horizontal", "columns": 3, "labelLimit": 320, "symbolLimit": 60,
        "symbolOpacity": 1,
    },
    "header": _TEXT,
    "title": {
        "color": "currentColor", "subtitleColor": "currentColor", "anchor": "start", "fontSize": 14, "subtitleFontSize": 12,
    },
    "text": {"color": "currentColor", "fontSize": 11},
    "rule": {"color": "currentColor"},
}  # fmt: skip


def stacked(panels: Sequence[Any], title: str, subtitle: str = "", **shared: Any) -> alt.VConcatChart:
    """Return panels above each other under one title, each with its own colours and legend; `x="shared"` joins the axes."""
    heading = alt.TitleParams(shown(title), subtitle=shown(subtitle) if subtitle else alt.Undefined)
    chart = alt.vconcat(*panels, title=heading, spacing=20)
    own: Any = dict.fromkeys(("color", "shape", "strokeDash"), "independent")
    return chart.resolve_scale(**own, **shared).configure(**_CONFIG)


def data(rows: Sequence[Row]) -> alt.InlineData:
    """Return rows as a chart's data: their text as `shown`, and null for numbers that JSON lacks."""
    return alt.InlineData([{k: shown(v) if isinstance(v, str) else finite(v) for k, v in row.items()} for row in rows])


def series(field: str, names: Iterable[str]) -> dict[str, Any]:
    """Return the encodings that tell series apart: a colour, a shape and dashes for each name, with one legend."""
    domain = [shown(name) for name in dict.fromkeys(names)]
    legend = alt.Legend(title=None) if len(domain) > 1 else None

    def options(values: Sequence[Any], places: Iterable[int]) -> dict[str, Any]:
        chosen = [values[place % len(values)] for place in places]
        return {"shorthand": f"{field}:N", "legend": legend, "scale": alt.Scale(domain=domain, range=chosen)}

    places = range(len(domain))
    # A colour that comes back has another shape and other dashes.
    rounds = [place // len(COLOURS) for place in places]
    shapes = [place + turn for place, turn in zip(places, rounds, strict=True)]
    encodings: dict[str, Any] = {
        "color": alt.Color(**options(COLOURS, places)),
        "shape": alt.Shape(**options(SHAPES, shapes)),
    }
    if any(rounds):
        encodings["strokeDash"] = alt.StrokeDash(**options(DASHES, rounds))
    return encodings


def lines(rows: Sequence[Row], x: Any, y: Any, encodings: Mapping[str, Any], height: int = 200) -> Any:
    """Return a line for each series with a point at each value, and a band where rows have `low` and `high`."""
    chart = alt.Chart(data(rows)).encode(x=x, y=y, tooltip=_tooltip(rows))
    colour, shape = encodings["color"], encodings["shape"]
    layers = [chart.mark_line(strokeWidth=1.8).encode(**{k: v for k, v in encodings.items() if k != "shape"})]
    if len({row[x["shorthand"].partition(":")[0]] for row in rows}) <= MOST_POINTS:
        layers.append(chart.mark_point(filled=True, size=40, opacity=1).encode(color=colour, shape=shape))
    if any(row.get("low") is not None for row in rows):
        low = alt.Y("low:Q", title=y["title"], scale=y["scale"])
        layers.insert(0, chart.mark_area(opacity=0.18).encode(y=low, y2="high:Q", color=colour))
    return alt.layer(*layers).properties(width=WIDTH, height=height)


def intervals(rows: Sequence[Row], x: Any, y: Any, encodings: Mapping[str, Any], height: int, along: str = "x") -> Any:
    """Return a point for each row with its interval from `low` to `high` along the axis `x` or `y`."""
    numeric = {"x": x, "y": y}[along]
    chart = alt.Chart(data(rows)).encode(x=x, y=y, tooltip=_tooltip(rows))
    moved = {name: value for name, value in encodings.items() if name.endswith("Offset")}
    span: Any = {along: type(numeric)("low:Q", title=numeric["title"], scale=numeric["scale"]), f"{along}2": "high:Q"}
    rule = chart.mark_rule(strokeWidth=1.6).encode(color=encodings["color"], **span, **moved)
    marks = {"color": encodings["color"], "shape": encodings["shape"]}
    points = chart.mark_point(filled=True, size=70, opacity=1).encode(**marks, **moved)
    return alt.layer(rule, points).properties(width=WIDTH, height=height)


def around(value: float | None, margin: float | None) -> dict[str, float | None]:
    """Return the ends of an interval as `low` and `high`; None without a margin."""
    if value is None or margin is None:
        return {"low": None, "high": None}
    return {"low": value - margin, "high": value + margin}


def save_figure(chart: Any, path: Path | str) -> None:
    """Write a chart, or its specification, as PNG, SVG or PDF, by the suffix; missing folders are made.

    Raises:
        UsageError: another suffix, or a file that cannot be written.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise UsageError(f"{path}: {path.suffix or 'no suffix'} is not allowed; allowed: {', '.join(FORMATS)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, rendered(chart, path.suffix))
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error})") from error


def save_formats(chart: Any, stem: Path) -> list[Path]:
    """Write a chart in every format; return the paths, `stem` with the suffixes."""
    paths = [stem.with_name(f"{stem.name}{suffix}") for suffix in FORMATS]
    for path in paths:
        save_figure(chart, path)
    return paths


def rendered(chart: Any, suffix: str) -> bytes:
    """Return a chart, or its specification, in one of the `FORMATS`."""
    import vl_convert

    # Without the transparent page behind it, black marks vanish on a dark one.
    spec = {**(chart if isinstance(chart, Mapping) else chart.to_dict()), "background": "white"}
    spec["config"] = {**spec["config"], "background": "white"}
    if suffix == ".svg":
        return vl_convert.vegalite_to_svg(spec).encode()
    return vl_convert.vegalite_to_png(spec, scale=SCALE) if suffix == ".png" else vl_convert.vegalite_to_pdf(spec)


def short_name(name: str) -> str:
    """Return the end of a long name, because paths of runs differ at their ends."""
    return name if len(name) <= LONGEST_LABEL else "…" + name[1 - LONGEST_LABEL :]


def metric_label(metric: str) -> str:
    """Return the name of a metric for an axis."""
    return METRIC_LABELS.get(metric, metric.replace("_", " "))


def _tooltip(rows: Sequence[Row]) -> list[alt.Tooltip]:
    first = {key: value for row in rows for key, value in row.items() if value is not None}
    tooltips = []
    for key, value in first.items():
        options: Any = {"format": ".4~g"} if isinstance(value, float) else {}
        tooltips.append(alt.Tooltip(f"{key}:{'N' if isinstance(value, str) else 'Q'}", **options))
    return tooltips
