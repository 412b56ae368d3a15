"""Pictures of analyses and runs, from plain dictionaries as they stand in the result files.

Every function makes its own `Figure` and saves it; nothing touches pyplot's global state. The file type follows the
path's suffix (PNG, PDF, SVG). Colours are those of Okabe and Ito, which colour-blind readers can tell apart, and every
series also differs in marker or line style. Values that are missing (null) leave a gap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pivotune.report.drawing import (
    COLOURS,
    GREY,
    PathLike,
    add_note,
    as_number,
    draw_legend,
    draw_legend_of,
    draw_line,
    drawable,
    new_figure,
    save_figure,
    set_title,
    short_name,
)

CONFIDENCE = 1.96  # standard errors on either side: 95 %
MARK_POINTS = 13  # height of the names of i and j above a panel
LONGEST_TITLE = 36  # characters of a model name

_TRAINING_LABELS = {
    "loss": "total",
    "tft_loss": "answer (TFT)",
    "conversion_loss": "conversion",
    "thinking_loss": "thinking",
    "eval_nll": "held-out",
    "eval_loss": "held-out",
    "eval_target_nll": "target language",
    "eval_english_nll": "English",
}
_METRIC_LABELS = {"f1": "F1", "nll": "held-out answer NLL\n(nats per token)", "bleu": "BLEU", "chrf++": "chrF++"}
_SWEEP_ERRORS = {
    "seeds": "bars: standard deviation over seeds",
    "items": "bars: 95 % interval over items (one seed)",
}
_INNER = ("conversion_loss", "thinking_loss")
# Places in COLOURS: the target language is blue and English vermilion, as in the entropy pictures.
_TRAINING_COLOURS = {"loss": 6, "tft_loss": 0, "conversion_loss": 2, "thinking_loss": 3, "eval_english_nll": 1}


def plot_entropy(layers: Mapping[str, Any], path: PathLike) -> None:
    """Mean entropy of every layer with the chosen layers i and j; below it agreement and English share.

    Args:
        layers: content of `layers.json` (`pivotune.layers.analysis.LayerAnalysis`).
    """
    languages = {layers.get("language") or "target": layers["target"]}
    if layers.get("english"):
        languages["en"] = layers["english"]
    with_shares = any(profile.get(key) for profile in languages.values() for key in ("agreement", "english_share"))
    figure, all_axes = new_figure((3, 2) if with_shares else (3,))
    for index, (language, profile) in enumerate(languages.items()):
        label = drawable(language, "target")
        _entropy_curve(all_axes[0], profile, label, index)
        if with_shares:
            _share_curves(all_axes[1], profile, label, index)
    _mark_layers(all_axes, layers["conversion"], layers["thinking"])
    _finish_layers(all_axes, layers["num_layers"])
    found = {"entropy-falls": "read from the two entropy falls", "explicit": "as asked for"}
    how = found.get(layers["method"], "the paper's relative depths (no two clear entropy falls)")
    name = short_name(str(layers["model"]), "the model", LONGEST_TITLE)
    set_title(all_axes[0], f"Logit-lens entropy by layer: {name}", f"i and j: {how}", above=MARK_POINTS)
    save_figure(figure, path)


def plot_entropy_comparison(
    profiles: Mapping[str, Mapping[str, Any]],
    path: PathLike,
    *,
    language: str | None = None,
    conversion: int | None = None,
    thinking: int | None = None,
) -> None:
    """Entropy by layer of several models on the same text, such as before training and after each method.

    Args:
        profiles: name of the model -> its profile (`LayerProfile.to_dict()`).
        language: code of the text's language, for the title.
    """
    figure, all_axes = new_figure((3.4,))
    for index, (name, profile) in enumerate(profiles.items()):
        _entropy_curve(all_axes[0], profile, short_name(name, f"model {index + 1}"), index)
    _mark_layers(all_axes, conversion, thinking)
    _finish_layers(all_axes, max(len(profile["entropy"]) for profile in profiles.values()) - 1)
    subtitle = f"language: {drawable(language, 'target')}" if language else ""
    set_title(all_axes[0], "Logit-lens entropy by layer", subtitle, above=MARK_POINTS if conversion or thinking else 0)
    save_figure(figure, path)


def plot_training(metrics: Sequence[Mapping[str, Any]], path: PathLike) -> None:
    """Loss terms and held-out likelihood over the steps of a run, a panel for each kind there is.

    Args:
        metrics: lines of `metrics.jsonl`: `step` with `loss`, `tft_loss`, `conversion_loss`, `thinking_loss`,
            `eval_target_nll`, `eval_english_nll` or other keys that end in `_loss` or `_nll`.
    """
    panels = [(label, keys) for label, keys in _training_panels(metrics) if keys]
    figure, all_axes = new_figure([2.2] * max(len(panels), 1))
    for axes, (label, keys) in zip(all_axes, panels, strict=False):
        for index, key in enumerate(keys):
            lines = [line for line in metrics if key in line and "step" in line]
            steps, values = [line["step"] for line in lines], [as_number(line[key]) for line in lines]
            draw_line(axes, steps, values, _training_label(key), _TRAINING_COLOURS.get(key, index))
        axes.set_ylabel(label)
        draw_legend(axes)
    if not panels:
        all_axes[0].text(0.5, 0.5, "no loss was logged", ha="center", va="center", transform=all_axes[0].transAxes)
    all_axes[-1].set_xlabel("optimizer step")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    set_title(all_axes[0], "Training")
    save_figure(figure, path)


def plot_metric_bars(
    results: Mapping[str, Mapping[str, float | None]],
    path: PathLike,
    *,
    errors: Mapping[str, Mapping[str, float | None]] | None = None,
    ylabel: str = "held-out answer NLL (nats per token)",
    xlabel: str = "language of question and answer",
    title: str = "Held-out answers (lower is better)",
) -> None:
    """Grouped bars: a group for each measure, a bar in it for each method, the value above the bar.

    Args:
        results: method -> measure (such as a language code) -> value.
        errors: standard errors in the same form, drawn as 95 % intervals.
    """
    measures = list(dict.fromkeys(measure for values in results.values() for measure in values))
    figure, (axes,) = new_figure((3.6,))
    width = 0.8 / max(len(results), 1)
    for index, (method, values) in enumerate(results.items()):
        places = [group + (index - (len(results) - 1) / 2) * width for group in range(len(measures))]
        heights = [as_number(values.get(measure)) for measure in measures]
        margins = [CONFIDENCE * as_number((errors or {}).get(method, {}).get(measure)) for measure in measures]
        _bars(axes, places, heights, margins, 0.92 * width, short_name(method, f"method {index + 1}"), index)
    axes.set_xticks(range(len(measures)), [drawable(measure, f"measure {n}") for n, measure in enumerate(measures, 1)])
    axes.set_ylabel(ylabel)
    axes.set_xlabel(xlabel)
    axes.margins(y=0.12)
    axes.grid(visible=False, axis="x")
    axes.tick_params(axis="x", length=0)
    draw_legend(axes)
    set_title(axes, title, "bars: 95 % interval of the mean" if errors else "")
    save_figure(figure, path)


def plot_layer_sweep(curve: Mapping[str, Any], path: PathLike) -> None:
    """Scores by the supervised layer (the paper's Figure 3), with the entropy of the layers on a second axis.

    A panel for each metric; in it a line for each task, with TFT as a dashed line of the same colour where it is there.

    Args:
        curve: what `pivotune.sweeps.layers.layer_curve` gives.
    """
    layers, series = curve["layers"], curve["series"]
    metrics = list(dict.fromkeys(one["metric"] for one in series))
    figure, all_axes = new_figure([2.9] * max(len(metrics), 1))
    for axes, metric in zip(all_axes, metrics, strict=False):
        own = [one for one in series if one["metric"] == metric]
        for index, one in enumerate(own):
            _layer_scores(axes, one, index)
        axes.set_ylabel(_METRIC_LABELS.get(metric) or drawable(str(metric).replace("_", " "), "score"))
        handles, labels = axes.get_legend_handles_labels()
        if layers:
            twin_handles, twin_labels = _entropy_beside(axes, layers["target"]["entropy"])
            handles, labels = handles + twin_handles, labels + twin_labels
        draw_legend_of(axes, handles, labels, aside=1.13 if layers else 1.01)
    if not series:
        all_axes[0].text(0.5, 0.5, "no cell is finished", ha="center", va="center", transform=all_axes[0].transAxes)
    all_axes[-1].set_xlabel(f"{curve['term']} layer (after k blocks)")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, steps=[1, 2, 4, 5, 10]))
    set_title(all_axes[0], f"Score by {curve['term']} layer", _SWEEP_ERRORS[curve["errors"]])
    save_figure(figure, path)


# ---- parts of pictures ----


def _entropy_curve(axes: Axes, profile: Mapping[str, Any], label: str, index: int) -> None:
    mean = [as_number(value) for value in profile["entropy"]]
    draw_line(axes, range(len(mean)), mean, label, index)
    errors = profile.get("entropy_stderr")
    if errors:
        margin = [CONFIDENCE * as_number(value) for value in errors]
        low, high = ([m + sign * e for m, e in zip(mean, margin, strict=True)] for sign in (-1, 1))
        axes.fill_between(range(len(mean)), low, high, color=COLOURS[index % len(COLOURS)], alpha=0.18, linewidth=0)


def _share_curves(axes: Axes, profile: Mapping[str, Any], language: str, index: int) -> None:
    kinds = (("agreement", "top-1 = output's", "-"), ("english_share", "on English tokens", ":"))
    for key, label, linestyle in kinds:
        if profile.get(key):
            values = [as_number(value) for value in profile[key]]
            fill = "white" if key == "english_share" else None
            draw_line(
                axes, range(len(values)), values, f"{language}: {label}", index,
                linestyle=linestyle, markerfacecolor=fill or COLOURS[index % len(COLOURS)],
            )  # fmt: skip


def _mark_layers(all_axes: Sequence[Axes], conversion: int | None, thinking: int | None) -> None:
    """Vertical lines at i and j through all panels, named above the first one and in its legend."""
    marks = (("i", conversion, "conversion", (0, (5, 3))), ("j", thinking, "thinking", (0, (1, 1.5))))
    close = conversion is not None and thinking is not None and thinking - conversion <= 2
    for symbol, layer, stage, dashes in marks:
        if layer is None:
            continue
        for axes in all_axes:
            label = f"end of {stage}: {symbol} = {layer}" if axes is all_axes[0] else None
            axes.axvline(layer, label=label, color=GREY, linestyle=dashes, linewidth=1.2, zorder=1)
        side = {"i": "right", "j": "left"}[symbol] if close else "center"
        add_note(all_axes[0], f"{symbol} = {layer}", (layer, 1), ("data", "axes fraction"), 3, ha=side)


def _finish_layers(all_axes: Sequence[Axes], num_layers: int) -> None:
    """Axis labels and legends of an entropy panel and, where there is one, the panel of shares below it."""
    all_axes[0].set_ylabel("mean entropy (nats)")
    for axes in all_axes[1:]:
        axes.set_ylabel("share of tokens\nor probability")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(-0.03, 1.03)
    for axes in all_axes:
        draw_legend(axes)
    all_axes[-1].set_xlabel("layer k (after k blocks; 0 = embeddings)")
    all_axes[-1].set_xlim(-0.5, num_layers + 0.5)
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, steps=[1, 2, 4, 5, 10]))


def _bars(
    axes: Axes,
    places: Sequence[float],
    heights: Sequence[float],
    margins: Sequence[float],
    width: float,
    label: str,
    index: int,
) -> None:
    axes.bar(places, heights, width, label=label, color=COLOURS[index % len(COLOURS)], linewidth=0)
    if any(map(math.isfinite, margins)):
        axes.errorbar(places, heights, yerr=margins, fmt="none", ecolor="black", elinewidth=1, capsize=3)
    for place, height, margin in zip(places, heights, margins, strict=True):
        top = height + margin if math.isfinite(margin) else height
        text, top = (f"{height:.2f}", top) if math.isfinite(height) else ("n/a", 0.0)
        add_note(axes, text, (place, top), "data", 2, ha="center", color="black")


def _layer_scores(axes: Axes, series: Mapping[str, Any], index: int) -> None:
    """One task's line over the layers, its error bars and its baseline."""
    points = series["points"]
    places, values = [point["layer"] for point in points], [as_number(point["value"]) for point in points]
    margins = [as_number(point["margin"]) for point in points]
    draw_line(axes, places, values, drawable(series["label"], f"task {index + 1}"), index)
    colour = COLOURS[index % len(COLOURS)]
    if any(map(math.isfinite, margins)):
        axes.errorbar(places, values, yerr=margins, fmt="none", ecolor=colour, elinewidth=1, capsize=3)
    if series["baseline"] is not None:
        label = f"TFT: {drawable(series['label'], f'task {index + 1}').strip()}"
        axes.axhline(series["baseline"], label=label, color=colour, linestyle=(0, (5, 3)), linewidth=1.2)


def _entropy_beside(axes: Axes, entropy: Sequence[float | None]) -> tuple[list[Any], list[Any]]:
    """The entropy curve in grey behind the scores, on an axis of its own at the right; its legend entry."""
    twin = axes.twinx()
    twin.spines[["top", "left", "bottom"]].set_visible(False)
    twin.spines["right"].set_color(GREY)
    twin.tick_params(colors=GREY, labelsize=9)
    twin.set_ylabel("mean entropy (nats)", color=GREY)
    values = [as_number(value) for value in entropy]
    label = "entropy before training"
    twin.plot(range(len(values)), values, label=label, color=GREY, linestyle=":", linewidth=1.6, alpha=0.8)
    twin.set_ylim(bottom=0)
    axes.set_zorder(twin.get_zorder() + 1)
    axes.patch.set_visible(False)
    return twin.get_legend_handles_labels()


def _training_panels(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    keys = list(dict.fromkeys(key for line in metrics if "step" in line for key in line))
    losses = [
        key for key in keys if key == "loss" or (key.endswith("_loss") and not key.startswith(("eval_", "train_")))
    ]
    heldout = [key for key in keys if key.startswith("eval_") and key.endswith("_nll")]
    heldout = heldout or [key for key in keys if key.startswith("eval_") and key.endswith("_loss")]
    return [
        ("training loss\n(nats per token)", [key for key in losses if key not in _INNER]),
        ("inner loss (nats per\ntoken, or 1 − cosine)", [key for key in losses if key in _INNER]),
        ("held-out answer NLL\n(nats per token)", heldout),
    ]


def _training_label(key: str) -> str:
    return _TRAINING_LABELS.get(key) or drawable(key.removeprefix("eval_").replace("_", " "), "other")
