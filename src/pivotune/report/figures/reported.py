"""Figures that a training sends to TensorBoard, W&B and Trackio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt

from pivotune.report.figures.base import lines, rendered, series, stacked
from pivotune.report.figures.layers import layer_figure


def reported_figures(layers: Mapping[str, Any] | None, kl: Mapping[int, tuple[float, float]]) -> dict[str, bytes]:
    """Return PNG by name: the layer analysis where layers were measured, and the lens where one was fitted.

    Args:
        layers: content of `layers.json`.
        kl: layer -> KL from the model's output, in nats: through the tuned and through the logit lens.
    """
    charts = {"layers/analysis": layer_figure(layers)} if layers else {}
    if kl:
        charts["layers/lens"] = lens_figure(kl)
    return {name: rendered(chart, ".png") for name, chart in charts.items()}


def lens_figure(kl: Mapping[int, tuple[float, float]]) -> alt.VConcatChart:
    """Return the KL from the model's own output by layer, through both lenses."""
    rows = [
        {"layer": layer, "kl": value, "lens": lens}
        for layer, values in sorted(kl.items())
        for lens, value in zip(("tuned", "logit"), values, strict=True)
    ]
    scale = alt.Scale(zero=False, padding=12)
    x = alt.X("layer:Q", title="layer k (after k blocks)", axis=alt.Axis(tickMinStep=1), scale=scale)
    y = alt.Y("kl:Q", title="KL from the output (nats)", scale=alt.Scale(zero=True))
    panel = lines(rows, x, y, series("lens", ("tuned", "logit")))
    return stacked([panel], "Lens and model output by layer", "on held-out text")
