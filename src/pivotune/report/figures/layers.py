"""Figures over the layers of a model: entropy and likelihood, the lens, a layer sweep, and translations found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from pivotune.report.figures.base import (
    WIDTH,
    around,
    data,
    intervals,
    lines,
    metric_label,
    rendered,
    series,
    short_name,
    stacked,
)
from pivotune.results.metrics import ERRORS_OF_95

_CHOSEN_BY = {
    "reading": "by the English text that each layer can say",
    "entropy-falls": "read from the two entropy falls",
    "explicit": "as asked for",
}
_SWEEP_ERRORS = {"seeds": "bars: standard deviation over seeds", "items": "bars: 95 % interval over items (one seed)"}
_SYMBOLS = {"conversion": "i", "thinking": "j"}
_PROJECTIONS = {"pca": "PCA", "tsne": "t-SNE"}
_SHARES = {"agreement": "top-1 = output's", "english_share": "on English tokens"}


def layer_figure(layers: Mapping[str, Any]) -> alt.VConcatChart:
    """Return the mean entropy of every layer of `layers.json` with i and j; below it the agreement with the output and the
    English share, and the likelihood of the English text where it was read (the paper's Figure 2)."""
    profiles = {layers.get("language") or "target": layers["target"]}
    if layers.get("english"):
        profiles["en"] = layers["english"]
    entropy = [row for language, profile in profiles.items() for row in _entropy_rows(profile, "language", language)]
    marks = supervised(layers)
    panels = [_over_layers(entropy, "language", "mean entropy (nats)", marks)]
    shares = [
        {"layer": layer, "share": value, "language": language, "series": f"{language}: {meaning}"}
        for language, profile in profiles.items()
        for key, meaning in _SHARES.items()
        for layer, value in enumerate(profile.get(key) or ())
    ]
    if shares:
        options: Any = {"axis": alt.Axis(format="%"), "height": 140}
        panels.append(_over_layers(shares, "series", "share of tokens\nor probability", marks, "share", **options))
    if reading := layers.get("reading"):
        names = {"conversion": "English query", "thinking": "English answer"}
        # The embeddings, layer 0, say nothing: their value would hide the others.
        nll = [
            {"layer": layer, "nll": value if layer else None, "series": label}
            for term, label in names.items()
            for layer, value in enumerate(reading[term])
        ]
        title = "NLL after the target\nprompt (nats per token)"
        panels.append(_over_layers(nll, "series", title, marks, "nll", height=140))
    how = _CHOSEN_BY.get(layers["method"], "the paper's relative depths (no two clear entropy falls)")
    lens = "Tuned" if layers.get("lens") == "tuned" else "Logit"
    title = f"{lens}-lens entropy by layer: {short_name(str(layers['model'])) or 'the model'}"
    return stacked(panels, title, f"{ends(layers)}: {how}")


def supervised(layers: Mapping[str, Any]) -> dict[str, int]:
    """Return the layers of the stages that a run supervises; of an analysis alone both."""
    return {stage: layers[stage] for stage in layers.get("supervised") or _SYMBOLS}


def ends(layers: Mapping[str, Any]) -> str:
    """Return a line that names these layers: `end of conversion i = 2, end of thinking j = 15`."""
    return ", ".join(f"end of {stage} {_SYMBOLS[stage]} = {layer}" for stage, layer in supervised(layers).items())


def entropy_comparison(
    profiles: Mapping[str, Mapping[str, Any]],
    *,
    language: str | None = None,
    conversion: int | None = None,
    thinking: int | None = None,
) -> alt.VConcatChart:
    """Return the entropy by layer of several models (profiles by name) on the same text, before and after training."""
    rows = [row for name, profile in profiles.items() for row in _entropy_rows(profile, "run", short_name(name))]
    marks = {"conversion": conversion, "thinking": thinking}
    panel = _over_layers(rows, "run", "mean entropy (nats)", marks, height=240)
    return stacked([panel], "Logit-lens entropy by layer", f"language: {language}" if language else "")


def retrieval_figure(by_layer: Mapping[str, Mapping[str, Any]]) -> alt.VConcatChart:
    """Return how often a sentence's nearest neighbour is its translation, by layer and run (`alignment` tasks).

    Args:
        by_layer: run -> the `by_layer` of its task: lists of L + 1 values in percent, and `chance`.
    """
    rows = [
        {"layer": layer, "accuracy": value, "run": short_name(name)}
        for name, values in by_layer.items()
        for layer, value in enumerate(values["retrieval_accuracy"])
    ]
    chance = alt.Chart(data([{"accuracy": next(iter(by_layer.values()))["chance"]}]))
    panel = _over_layers(rows, "run", "retrieval accuracy (%)", {}, "accuracy", height=240)
    panel += chance.mark_rule(strokeDash=[2, 2], opacity=0.6).encode(y="accuracy:Q")
    return stacked([panel], "Translations found by layer", "dotted: chance")


def projection_figure(projections: Mapping[str, Mapping[str, Any]], language: str) -> alt.VConcatChart:
    """Return sentences and translations in two dimensions (the paper's Figure 4), a panel for each run and method.

    Each sentence is a point, with a line to its translation.

    Args:
        projections: run -> the `projection` of its alignment task: `layer`, `accuracy`, and by method (`pca`, `tsne`) the
            places [[x, y], ...] of N sentences and then of their N translations.
    """
    panels = []
    encodings = series("language", (language, "en"))
    plain = alt.Axis(labels=False, ticks=False, grid=False)
    for run, found in projections.items():
        for method, title in _PROJECTIONS.items():
            if not (places := found.get(method)):
                continue
            half = len(places) // 2
            rows = []
            for n, (x, y) in enumerate(places):
                code = language if n < half else "en"
                rows.append({"x": x, "y": y, "language": code, "pair": n % half + 1, "run": short_name(run)})
            x, y = alt.X("x:Q", title=None, axis=plain), alt.Y("y:Q", title=None, axis=plain)
            base = alt.Chart(data(rows)).encode(x=x, y=y)
            links = base.mark_line(opacity=0.18, strokeWidth=1, color="currentColor").encode(detail="pair:Q")
            points = base.mark_point(filled=True, size=38, opacity=0.85).encode(
                color=encodings["color"], shape=encodings["shape"], tooltip=["pair:Q", "language:N", "run:N"]
            )
            heading = f"{short_name(run)}: {title} at layer {found['layer']}, retrieval {found['accuracy']:.1f} %"
            panels.append(alt.layer(links, points).properties(width=WIDTH, height=260, title=heading))
    return stacked(panels, "Sentences and their translations")


def sweep_figure(curve: Mapping[str, Any]) -> alt.VConcatChart:
    """Return scores by the supervised layer (the paper's Figure 3), a panel for each metric.

    Below them stands the entropy of the layers. TFT is a dashed line of its task's colour.

    Args:
        curve: the result of `pivotune.compare.layer_curve.layer_curve`.
    """
    panels = []
    for metric in dict.fromkeys(one["metric"] for one in curve["series"]):
        own = [one for one in curve["series"] if one["metric"] == metric]
        rows = [
            {key: point[key] for key in ("layer", "value", "seeds")}
            | {"task": one["label"], **around(point["value"], point["margin"])}
            for one in own
            for point in one["points"]
        ]
        tasks = series("task", [one["label"] for one in own])
        x = alt.X("layer:Q", title=f"{curve['term']} layer (after k blocks)", axis=alt.Axis(tickMinStep=1))
        y = alt.Y("value:Q", title=metric_label(metric), scale=alt.Scale(zero=False))
        panel = lines([{**row, "low": None, "high": None} for row in rows], x, y, tasks, 230)
        if any(row["low"] is not None for row in rows):
            panel += intervals(rows, x, y, tasks, 230, "y")
        baselines = [{"value": one["baseline"], "task": one["label"]} for one in own if one["baseline"] is not None]
        if baselines:
            tft = alt.Chart(data(baselines)).mark_rule(strokeDash=[6, 4], strokeWidth=1.4)
            panel += tft.encode(y=y, color=tasks["color"], tooltip=["task:N", alt.Tooltip("value:Q", title="TFT")])
        panels.append(panel)
    if not panels:
        panels.append(note("no cell is finished"))
    if curve["layers"]:
        entropy = [{"layer": k, "entropy": value} for k, value in enumerate(curve["layers"]["target"]["entropy"])]
        before = alt.Chart(data(entropy)).mark_area(line={"color": "currentColor"}, opacity=0.25, color="currentColor")
        x = alt.X("layer:Q", title="layer k", axis=alt.Axis(tickMinStep=1))
        y = alt.Y("entropy:Q", title=["mean entropy", "before (nats)"])
        panels.append(before.encode(x=x, y=y).properties(width=WIDTH, height=90))
    compared = any(one["baseline"] is not None for one in curve["series"])
    subtitle = _SWEEP_ERRORS[curve["errors"]] + ("; dashed: TFT" if compared else "")
    return stacked(panels, f"Score by {curve['term']} layer", subtitle, x="shared")


def reported_figures(layers: Mapping[str, Any] | None, kl: Mapping[int, tuple[float, float]]) -> dict[str, bytes]:
    """Return PNG by name, for TensorBoard and other loggers: the layer analysis, and the lens where one was fitted.

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


def note(text: str) -> alt.Chart:
    """Return a panel with a line of text in place of a drawing."""
    return alt.Chart(data([{"text": text}])).mark_text().encode(text="text:N").properties(width=WIDTH, height=140)


def _over_layers(
    rows: Sequence[Mapping[str, Any]],
    field: str,
    title: str,
    marks: Mapping[str, Any],
    value: str = "entropy",
    *,
    axis: Any = alt.Undefined,
    height: int = 200,
) -> Any:
    """Return lines over the layers, with rules at the chosen layers."""
    depth = max(row["layer"] for row in rows)
    title_of_x = "layer k (after k blocks; 0 = embeddings)"
    x = alt.X("layer:Q", title=title_of_x, axis=alt.Axis(tickMinStep=1), scale=alt.Scale(domain=[0, depth], nice=False))
    scale = alt.Scale(domain=[0, 1]) if value == "share" else alt.Scale()
    y = alt.Y(f"{value}:Q", title=title.split("\n"), axis=axis, scale=scale)
    panel = lines(rows, x, y, series(field, [row[field] for row in rows]), height)
    chosen = [
        {"layer": marks[stage], "mark": f"{symbol} = {marks[stage]}", "stage": f"end of {stage}"}
        for stage, symbol in _SYMBOLS.items()
        if marks.get(stage) is not None
    ]
    if not chosen:
        return panel
    base = alt.Chart(data(chosen)).encode(x=x, tooltip=["stage:N", "mark:N"])
    rules = base.mark_rule(strokeDash=[5, 3], opacity=0.7)
    # The names stand above the first panel, clear of its lines.
    names = base.mark_text(align="left", dx=4, baseline="top").encode(y=alt.value(0), text="mark:N")
    return alt.layer(rules, panel, *([names] if value == "entropy" else []))


def _entropy_rows(profile: Mapping[str, Any], field: str, name: str) -> list[dict[str, Any]]:
    """Return a row for each layer, with the 95 % interval of its mean entropy."""
    errors = profile.get("entropy_stderr") or [None] * len(profile["entropy"])
    rows = []
    for layer, (value, error) in enumerate(zip(profile["entropy"], errors, strict=True)):
        margin = None if error is None else ERRORS_OF_95 * error
        rows.append({"layer": layer, "entropy": value, field: name, **around(value, margin)})
    return rows
