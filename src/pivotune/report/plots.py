"""Draw figures of analyses and runs, from plain dictionaries as they stand in the result files.

The file type follows the path's suffix (PNG, PDF, SVG). Colours are those of Okabe and Ito (2008), which colour-blind
readers can tell apart, and every series also differs in marker or line style. Missing values (null) leave a gap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Without the yellow that vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
GREY = "#595959"
DASHED, DOTTED = (0, (5, 3)), (0, (1, 1.5))
DOTS_PER_INCH = 150
WIDTH = 8.6  # inches: 1290 pixels, a column of a web page or a full page of a paper
FONT = "DejaVu Sans"  # comes with matplotlib, so the figures are the same everywhere
MOST_MARKERS = 45
LONGEST_LABEL, LONGEST_TITLE = 30, 36  # characters of a model name
MARK_POINTS = 13  # height of the names of i and j above a panel
CONFIDENCE = 1.96  # standard errors on either side: 95 %

_TRAINING_LABELS = {
    "loss": "total", "tft_loss": "answer (TFT)", "conversion_loss": "conversion", "thinking_loss": "thinking",
    "eval_nll": "held-out", "eval_loss": "held-out", "eval_target_nll": "target language", "eval_english_nll": "English",
}  # fmt: skip
_METRIC_LABELS = {"f1": "F1", "nll": "held-out answer NLL\n(nats per token)", "bleu": "BLEU", "chrf++": "chrF++"}
_SWEEP_ERRORS = {"seeds": "bars: standard deviation over seeds", "items": "bars: 95 % interval over items (one seed)"}
_INNER = ("conversion_loss", "thinking_loss")
# Indices into COLOURS: the target language is blue and English vermilion, as in the entropy figures.
_TRAINING_COLOURS = {"loss": 6, "tft_loss": 0, "conversion_loss": 2, "thinking_loss": 3, "eval_english_nll": 1}


def plot_entropy(layers: Mapping[str, Any], path: str | Path) -> None:
    """Draw the mean entropy of every layer of `layers.json` with i and j; below it agreement and English share, and the
    likelihood of the English text where it was read."""
    languages = {layers.get("language") or "target": layers["target"]}
    if layers.get("english"):
        languages["en"] = layers["english"]
    shares = (("agreement", "top-1 = output's", "-", None), ("english_share", "on English tokens", ":", "white"))
    with_shares = any(profile.get(key) for profile in languages.values() for key, *_ in shares)
    reading = layers.get("reading")
    figure, all_axes = new_figure([3, *[2] * (with_shares + bool(reading))])
    for index, (language, profile) in enumerate(languages.items()):
        label = drawable(language, "target")
        _draw_entropy(all_axes[0], profile, label, index)
        for key, meaning, linestyle, fill in shares:
            if profile.get(key):
                style = {"linestyle": linestyle, "markerfacecolor": fill or _colour(index)}
                _draw_line(all_axes[1], range(len(profile[key])), profile[key], f"{label}: {meaning}", index, **style)
    _mark_layers(all_axes, layers["conversion"], layers["thinking"])
    if reading:
        names = {"conversion": "English query", "thinking": "English answer"}
        for index, (term, label) in enumerate(names.items()):
            # The embeddings, layer 0, say nothing: their value would hide the others.
            values = [None, *reading[term][1:]]
            _draw_line(all_axes[-1], range(len(values)), values, label, 2 + index)
        all_axes[-1].set_ylabel("NLL after the target\nprompt (nats per token)")
    for axes in all_axes[1 : 1 + with_shares]:
        axes.set_ylabel("share of tokens\nor probability")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(-0.03, 1.03)
    _finish_layers(all_axes, layers["num_layers"])
    found = {
        "reading": "by the English text that each layer can say",
        "entropy-falls": "read from the two entropy falls",
        "explicit": "as asked for",
    }
    how = found.get(layers["method"], "the paper's relative depths (no two clear entropy falls)")
    name = short_name(str(layers["model"]), "the model", LONGEST_TITLE)
    lens = "Tuned" if layers.get("lens") == "tuned" else "Logit"
    set_title(all_axes[0], f"{lens}-lens entropy by layer: {name}", f"i and j: {how}", above=MARK_POINTS)
    save_figure(figure, path)


def plot_entropy_comparison(
    profiles: Mapping[str, Mapping[str, Any]],
    path: str | Path,
    *,
    language: str | None = None,
    conversion: int | None = None,
    thinking: int | None = None,
) -> None:
    """Draw the entropy by layer of several models (profiles by name) on the same text, before and after training."""
    figure, all_axes = new_figure((3.4,))
    for index, (name, profile) in enumerate(profiles.items()):
        _draw_entropy(all_axes[0], profile, short_name(name, f"model {index + 1}"), index)
    _mark_layers(all_axes, conversion, thinking)
    _finish_layers(all_axes, max(len(profile["entropy"]) for profile in profiles.values()) - 1)
    subtitle = f"language: {drawable(language, 'target')}" if language else ""
    set_title(all_axes[0], "Logit-lens entropy by layer", subtitle, above=MARK_POINTS if conversion or thinking else 0)
    save_figure(figure, path)


def plot_training(metrics: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw loss terms and held-out likelihood over the steps of a run, a panel for each kind that was logged.

    Args:
        metrics: lines of `metrics.jsonl`: `step` with keys that end in `loss` or `_nll`.
    """
    logged = list(dict.fromkeys(key for line in metrics if "step" in line for key in line))
    losses = [key for key in logged if f"_{key}".endswith("_loss") and not key.startswith(("eval_", "train_"))]
    heldout = [[key for key in logged if key.startswith("eval_") and key.endswith(end)] for end in ("_nll", "_loss")]
    panels = {
        "training loss\n(nats per token)": [key for key in losses if key not in _INNER],
        "inner loss (nats per\ntoken, or 1 − cosine)": [key for key in losses if key in _INNER],
        "held-out answer NLL\n(nats per token)": heldout[0] or heldout[1],
    }
    panels = {label: keys for label, keys in panels.items() if keys}
    figure, all_axes = new_figure([2.2] * max(len(panels), 1))
    for axes, (label, keys) in zip(all_axes, panels.items(), strict=False):
        for index, key in enumerate(keys):
            lines = [line for line in metrics if key in line and "step" in line]
            steps, values = [line["step"] for line in lines], [line[key] for line in lines]
            name = _TRAINING_LABELS.get(key) or drawable(key.removeprefix("eval_").replace("_", " "), "other")
            _draw_line(axes, steps, values, name, _TRAINING_COLOURS.get(key, index))
        axes.set_ylabel(label)
        _draw_legend(axes)
    if not panels:
        all_axes[0].text(0.5, 0.5, "no loss was logged", ha="center", va="center", transform=all_axes[0].transAxes)
    all_axes[-1].set_xlabel("optimizer step")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    set_title(all_axes[0], "Training")
    save_figure(figure, path)


def plot_metric_bars(
    results: Mapping[str, Mapping[str, float | None]],
    path: str | Path,
    *,
    errors: Mapping[str, Mapping[str, float | None]] | None = None,
    differences: Mapping[str, Mapping[str, float | None]] | None = None,
    difference: str = "difference",
) -> None:
    """Draw held-out NLL as grouped bars: a group for each language, a bar in it for each method, its value above it.

    `results` and their standard `errors` (drawn as 95 % intervals) are by method, then language. A second panel, named
    `difference`, shows paired `differences`: language -> `value`, `low`, `high`.
    """
    languages = list(dict.fromkeys(language for values in results.values() for language in values))
    figure, (axes, *below) = new_figure((3.6, 1.7) if differences else (3.6,))
    width = 0.8 / max(len(results), 1)
    for index, (method, values) in enumerate(results.items()):
        places = [group + (index - (len(results) - 1) / 2) * width for group in range(len(languages))]
        heights = [_number(values.get(language)) for language in languages]
        margins = [CONFIDENCE * _number((errors or {}).get(method, {}).get(language)) for language in languages]
        label = short_name(method, f"method {index + 1}")
        axes.bar(places, heights, 0.92 * width, label=label, color=_colour(index), linewidth=0)
        _draw_margins(axes, places, heights, margins, "black")
        for place, height, margin in zip(places, heights, margins, strict=True):
            text = f"{height:.2f}" if math.isfinite(height) else "n/a"
            top = sum(number for number in (height, margin) if math.isfinite(number)) if text != "n/a" else 0.0
            _add_note(axes, text, (place, top), "data", 2, ha="center", color="black")
    names = [drawable(language, f"language {n}") for n, language in enumerate(languages, 1)]
    axes.set_xticks(range(len(languages)), names)
    axes.set_ylabel("held-out answer NLL (nats per token)")
    for axes_below in below:
        points = [(differences or {}).get(language, {}) for language in languages]
        values, low, high = ([_number(point.get(key)) for point in points] for key in ("value", "low", "high"))
        margins = [
            [value - bound for value, bound in zip(values, low, strict=True)],
            [bound - value for value, bound in zip(values, high, strict=True)],
        ]
        style = {"fmt": "o", "color": "black", "elinewidth": 1, "capsize": 3, "markersize": 4}
        axes_below.errorbar(range(len(languages)), values, yerr=margins, **style)
        axes_below.axhline(0, color=GREY, linestyle=DASHED, linewidth=1)
        for place, value in enumerate(values):
            # Beside the point, not upon it.
            text = f"   {value:+.3f}" if math.isfinite(value) else "n/a"
            _add_note(
                axes_below, text, (place, value if math.isfinite(value) else 0), "data", -3, ha="left", color="black"
            )
        axes_below.set_ylabel(f"{difference}\n(paired, 95 %)")
        axes_below.margins(y=0.2)
        axes_below.grid(visible=False, axis="x")
    (below[-1] if below else axes).set_xlabel("language of question and answer")
    axes.margins(y=0.12)
    axes.grid(visible=False, axis="x")
    axes.tick_params(axis="x", length=0)
    _draw_legend(axes)
    set_title(axes, "Held-out answers (lower is better)", "bars: 95 % interval of the mean" if errors else "")
    save_figure(figure, path)


def plot_layer_sweep(curve: Mapping[str, Any], path: str | Path) -> None:
    """Draw scores by the supervised layer (the paper's Figure 3), with the entropy of the layers on a second axis.

    A panel for each metric; in it a line for each task, with TFT as a dashed line of the same colour if it was trained.
    `curve` is the result of `pivotune.sweeps.layer_curve.layer_curve`.
    """
    layers, series = curve["layers"], curve["series"]
    metrics = list(dict.fromkeys(one["metric"] for one in series))
    figure, all_axes = new_figure([2.9] * max(len(metrics), 1))
    for axes, metric in zip(all_axes, metrics, strict=False):
        for index, one in enumerate(one for one in series if one["metric"] == metric):
            points, label = one["points"], drawable(one["label"], f"task {index + 1}")
            places, values = [point["layer"] for point in points], [_number(point["value"]) for point in points]
            _draw_line(axes, places, values, label, index)
            _draw_margins(axes, places, values, [_number(point["margin"]) for point in points], _colour(index))
            if one["baseline"] is not None:
                style = {"color": _colour(index), "linestyle": DASHED, "linewidth": 1.2}
                axes.axhline(one["baseline"], label=f"TFT: {label.strip()}", **style)
        axes.set_ylabel(_METRIC_LABELS.get(metric) or drawable(str(metric).replace("_", " "), "score"))
        entropy = _draw_entropy_behind(axes, layers["target"]["entropy"]) if layers else ()
        _draw_legend(axes, *entropy, aside=1.13 if layers else 1.01)
    if not series:
        all_axes[0].text(0.5, 0.5, "no cell is finished", ha="center", va="center", transform=all_axes[0].transAxes)
    all_axes[-1].set_xlabel(f"{curve['term']} layer (after k blocks)")
    all_axes[-1].xaxis.set_major_locator(_layer_ticks())
    set_title(all_axes[0], f"Score by {curve['term']} layer", _SWEEP_ERRORS[curve["errors"]])
    save_figure(figure, path)


# ---- panels, titles and files ----


def new_figure(heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels of these heights (inches) above each other, with one x axis."""
    figure = Figure(figsize=(WIDTH, sum(heights) + 1.0), dpi=DOTS_PER_INCH, layout="constrained")
    gridspec = {"height_ratios": list(heights)}
    all_axes = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw=gridspec)[:, 0])
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.grid(visible=True, color="#E3E3E3", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(colors=GREY, labelcolor="black", labelsize=9)
    figure.align_ylabels()
    return figure, all_axes


def set_title(axes: Axes, title: str, subtitle: str = "", *, above: float = 0) -> None:
    """Set title and subtitle at the left, `above` points higher to leave room for marks."""
    if subtitle:
        _add_note(axes, subtitle, (0, 1), "axes fraction", above + 6, ha="left")
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", pad=above + (19 if subtitle else 8))


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write the figure with all of its text in one font; missing folders are made."""
    for axes in figure.axes:
        for item in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()):
            item.set_fontfamily(FONT)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi="figure", facecolor="white")


def short_name(name: str, fallback: str, longest: int = LONGEST_LABEL) -> str:
    """Return the end of a long name, because paths of runs differ at their ends."""
    return drawable(name if len(name) <= longest else "…" + name[1 - longest :], fallback)


def drawable(text: str, fallback: str) -> str:
    """Return `text` if the font can show it, else `fallback`; never read as a formula or as a hidden legend entry."""
    if not text.strip() or not all(letter.isprintable() and ord(letter) in _font_characters() for letter in text):
        text = fallback
    return (" " + text if text.startswith("_") else text).replace("$", r"\$")


@cache
def _font_characters() -> frozenset[int]:
    """Return the font's code points without Arabic and Hebrew, whose letters would need shaping."""
    covered = get_font(findfont(FontProperties(family=FONT))).get_charmap()
    return frozenset(code for code in covered if not 0x0590 <= code <= 0x08FF)


# ---- parts of figures ----


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _layer_ticks() -> MaxNLocator:
    return MaxNLocator(nbins=12, integer=True, steps=[1, 2, 4, 5, 10])


def _draw_line(axes: Axes, x: Sequence[float], y: Sequence[float | None], label: str, index: int, **style: Any) -> None:
    """Draw a line in the colour, marker and style of its index; few enough points have markers."""
    settings = {
        "color": _colour(index),
        "linestyle": LINES[index // len(COLOURS) % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)] if len(x) <= MOST_MARKERS else None,
        "markersize": 4,
        "linewidth": 1.6,
        **style,
    }
    axes.plot(x, [_number(value) for value in y], label=label, **settings)


def _draw_margins(axes: Axes, x: Sequence[float], y: Sequence[float], margins: Sequence[float], colour: str) -> None:
    if any(map(math.isfinite, margins)):
        axes.errorbar(x, y, yerr=margins, fmt="none", ecolor=colour, elinewidth=1, capsize=3)


def _draw_legend(axes: Axes, *more: Sequence[Any], aside: float = 1.01) -> None:
    """Draw the axes' legend, with `more` handles and labels, `aside` of their width right of their left border."""
    own = axes.get_legend_handles_labels()
    handles, labels = ([*first, *added] for first, added in zip(own, more or ([], []), strict=True))
    if handles:
        place = {"loc": "upper left", "bbox_to_anchor": (aside, 1.0), "borderaxespad": 0}
        axes.legend(handles, labels, **place, frameon=False, handlelength=2.6, prop={"family": FONT, "size": 9})


def _add_note(axes: Axes, text: str, place: tuple[float, float], coordinates: Any, lift: float, **style: Any) -> None:
    """Add small text `lift` points above a place."""
    settings = {"va": "bottom", "fontsize": 9, "color": GREY, "family": FONT, **style}
    axes.annotate(text, place, xycoords=coordinates, xytext=(0, lift), textcoords="offset points", **settings)


def _draw_entropy(axes: Axes, profile: Mapping[str, Any], label: str, index: int) -> None:
    """Draw an entropy curve with its 95 % band."""
    mean = [_number(value) for value in profile["entropy"]]
    _draw_line(axes, range(len(mean)), mean, label, index)
    if errors := profile.get("entropy_stderr"):
        margins = [CONFIDENCE * _number(value) for value in errors]
        low, high = ([m + sign * e for m, e in zip(mean, margins, strict=True)] for sign in (-1, 1))
        axes.fill_between(range(len(mean)), low, high, color=_colour(index), alpha=0.18, linewidth=0)


def _draw_entropy_behind(axes: Axes, entropy: Sequence[float | None]) -> tuple[list[Any], list[Any]]:
    """Draw the entropy in grey behind the scores, on its own axis at the right; return its legend entry."""
    twin = axes.twinx()
    twin.spines[["top", "left", "bottom"]].set_visible(False)
    twin.spines["right"].set_color(GREY)
    twin.tick_params(colors=GREY, labelsize=9)
    twin.set_ylabel("mean entropy (nats)", color=GREY)
    style = {"color": GREY, "linestyle": ":", "linewidth": 1.6, "alpha": 0.8}
    twin.plot(range(len(entropy)), list(map(_number, entropy)), label="entropy before training", **style)
    twin.set_ylim(bottom=0)
    axes.set_zorder(twin.get_zorder() + 1)
    axes.patch.set_visible(False)
    return twin.get_legend_handles_labels()


def _mark_layers(all_axes: Sequence[Axes], conversion: int | None, thinking: int | None) -> None:
    """Draw vertical lines at i and j through all panels, named above the first one and in its legend."""
    close = conversion is not None and thinking is not None and thinking - conversion <= 2
    marks = (("i", conversion, "conversion", DASHED, "right"), ("j", thinking, "thinking", DOTTED, "left"))
    for symbol, layer, stage, dashes, side in marks:
        if layer is None:
            continue
        for axes in all_axes:
            label = f"end of {stage}: {symbol} = {layer}" if axes is all_axes[0] else None
            axes.axvline(layer, label=label, color=GREY, linestyle=dashes, linewidth=1.2, zorder=1)
        place = {"ha": side if close else "center"}
        _add_note(all_axes[0], f"{symbol} = {layer}", (layer, 1), ("data", "axes fraction"), 3, **place)


def _finish_layers(all_axes: Sequence[Axes], num_layers: int) -> None:
    """Add labels and legends to panels over layers."""
    all_axes[0].set_ylabel("mean entropy (nats)")
    for axes in all_axes:
        _draw_legend(axes)
    all_axes[-1].set_xlabel("layer k (after k blocks; 0 = embeddings)")
    all_axes[-1].set_xlim(-0.5, num_layers + 0.5)
    all_axes[-1].xaxis.set_major_locator(_layer_ticks())
