"""Figure of the lens explorer: the likeliest token of every layer at every token of a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import altair as alt

from pivotune.report.figures.base import data, short_name, stacked

COLOURS = {"probability": "probability of the likeliest token", "entropy": "entropy (nats)"}
_CHANGE = "KL divergence between the models (nats)"
_MOST = 16  # positions side by side; the others stand below
_CELL = 66, 20  # pixels
_READ = "token read"  # the row of the text itself


def lens_figures(
    models: Sequence[str], item: Mapping[str, Any], colour: str = "probability"
) -> Iterator[tuple[str, alt.VConcatChart]]:
    """Yield a name and a chart for each side, lens and model of a text, and for the difference of two models.

    Args:
        item: a text as `pivotune.explore.reader.LensReader.read` returns it.
        colour: a key of `COLOURS`; the difference has its KL divergence.
    """
    for side in item["sides"]:
        for lens in side["grids"][0]:
            grids = [grid[lens] for grid in side["grids"]]
            for place, (model, grid) in enumerate(zip(models, grids, strict=True), start=1):
                values = grid["entropy"] if colour == "entropy" else grid["probabilities"][:: len(grid["likeliest"][0])]
                chart = _chart(side, [grid], values, COLOURS[colour], f"{lens} lens of {short_name(model)}")
                yield f"{side['name'].lower()}-{lens}" + (f"-model-{place}" if len(models) > 1 else ""), chart
            if change := side["differences"].get(lens):
                title = f"{lens} lens of {short_name(models[0])}; below, where it differs, of {short_name(models[1])}"
                yield f"{side['name'].lower()}-{lens}-difference", _chart(side, grids, change["kl"], _CHANGE, title)


def _chart(side: Mapping[str, Any], grids: Sequence[Any], values: Sequence[float], legend: str, title: str) -> Any:
    """Return panels of whole columns, `_MOST` positions each; the tokens of a second grid stand below the first's."""
    starts, place = [], 0
    for text, span, _ in side["columns"]:
        starts.append((place, span, seen(text)))
        place += span
    parts: list[list[tuple[int, int, str]]] = [[]]
    for start, span, text in starts:
        if parts[-1] and start + span - parts[-1][0][0] > _MOST:
            parts.append([])
        parts[-1].append((start, span, text))
    top = 1.0 if legend == COLOURS["probability"] else max(values)
    colour = alt.Color(
        "value:Q",
        title=legend,
        scale=alt.Scale(domain=[0, top or 1.0], range=["#ffffff", "#79b8ee"], interpolate="rgb"),
        legend=alt.Legend(gradientLength=200, titleLimit=500),
    )
    panels = [
        _panel(side, grids, values, part, colour if n == 0 else colour.legend(None)) for n, part in enumerate(parts)
    ]
    return stacked(panels, title[0].upper() + title[1:])


def _panel(
    side: Mapping[str, Any],
    grids: Sequence[Any],
    values: Sequence[float],
    columns: Sequence[tuple[int, int, str]],
    colour: Any,
) -> Any:
    positions, first = side["positions"], columns[0][0]
    end, depth = sum(columns[-1][:2]), len(values) // positions - 1
    layers = [str(layer) for layer in range(depth)] + [f"{depth} output"]
    rows = []
    for layer, name in enumerate(layers):
        for position in range(first, end):
            at = layer * positions + position
            token, *others = dict.fromkeys(seen(side["texts"][grid["likeliest"][at][0]]) for grid in grids)
            box = {"layer": name, "from": position, "to": position + 1, "middle": position + 0.5}
            rows.append({**box, "value": values[at], "token": token, "other": others[0] if others else None})
    read = [
        {"layer": _READ, "from": start, "to": start + span, "middle": start + span / 2, "token": text}
        for start, span, text in columns
    ]
    scale = alt.Scale(domain=[first, first + _MOST], nice=False, reverse=side["rtl"])
    axis = alt.Axis(orient="right" if side["rtl"] else "left", domain=False, ticks=False)
    y = alt.Y("layer:O", sort=[_READ, *layers[::-1]], title="layer", axis=axis)
    start, middle = (alt.X(f"{key}:Q", scale=scale, axis=None) for key in ("from", "middle"))
    boxes, at = {"x": start, "x2": alt.X2("to:Q"), "y": y}, {"x": middle, "y": y}
    width, height = _CELL[0], _CELL[1] * (1.6 if len(grids) > 1 else 1)
    cells = alt.Chart(data(rows)).mark_rect(stroke="white").encode(**boxes, color=colour)
    heads = alt.Chart(data(read)).mark_rect(fill="#00000000", stroke="#999999").encode(**boxes)
    drawn = [cells, heads]

    def write(kept: Sequence[Mapping[str, Any]], field: str, dy: float = 0, **style: Any) -> None:
        if kept:
            text = alt.Chart(data(kept)).mark_text(limit=width - 4, fontSize=10, color="black", dy=dy, **style)
            drawn.append(text.encode(**at, text=f"{field}:N"))

    write([row for row in rows if row["other"] is None], "token")
    for field, dy in (("token", -height / 4 + 1), ("other", height / 4 - 1)):
        write([row for row in rows if row["other"] is not None], field, dy)
    write(read, "token", fontWeight="bold")
    return alt.layer(*drawn).properties(width=width * _MOST, height=height * (depth + 2))


def seen(text: str) -> str:
    """Return text with signs for white space that would not be seen, as the page draws it."""
    text = text.replace("\n", "↵").replace("\t", "⇥")
    return text if text.strip() else "␣" * len(text)
