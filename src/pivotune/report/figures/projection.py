"""Figure of sentences and their translations in two dimensions (the paper's Figure 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt

from pivotune.report.figures.base import WIDTH, data, series, short_name, stacked

_METHODS = {"pca": "PCA", "tsne": "t-SNE"}


def projection_figure(projections: Mapping[str, Mapping[str, Any]], language: str) -> alt.VConcatChart:
    """Return a panel for each run and method, with a point for each sentence and a line to its translation.

    Args:
        projections: run -> the `projection` of its alignment task: `layer`, `accuracy`, and by method (`pca`, `tsne`) the
            places [[x, y], ...] of N sentences and then of their N translations.
    """
    panels = []
    encodings = series("language", (language, "en"))
    plain = alt.Axis(labels=False, ticks=False, grid=False)
    for run, found in projections.items():
        for method, title in _METHODS.items():
            if not (places := found.get(method)):
                continue
            half = len(places) // 2
            rows = [
                {
                    "x": x,
                    "y": y,
                    "language": language if n < half else "en",
                    "pair": n % half + 1,
                    "run": short_name(run),
                }
                for n, (x, y) in enumerate(places)
            ]
            base = alt.Chart(data(rows)).encode(
                x=alt.X("x:Q", title=None, axis=plain), y=alt.Y("y:Q", title=None, axis=plain)
            )
            links = base.mark_line(opacity=0.18, strokeWidth=1, color="currentColor").encode(detail="pair:Q")
            points = base.mark_point(filled=True, size=38, opacity=0.85).encode(
                color=encodings["color"], shape=encodings["shape"], tooltip=["pair:Q", "language:N", "run:N"]
            )
            heading = f"{short_name(run)}: {title} at layer {found['layer']}, retrieval {found['accuracy']:.1f} %"
            panels.append(alt.layer(links, points).properties(width=WIDTH, height=260, title=heading))
    return stacked(panels, "Sentences and their translations")
