"""What every picture is drawn with: colours, panels, lines, legends, titles, and texts that the font can show.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart, and every series also differs in marker or
line style. Nothing touches pyplot's global state.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

PathLike = str | os.PathLike[str]

# Okabe and Ito (2008), without the yellow that vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
GREY = "#595959"
DOTS_PER_INCH = 150
WIDTH = 8.6  # inches: 1290 pixels, a column of a web page or a full page of a paper
FONT = "DejaVu Sans"  # comes with matplotlib, so the pictures are the same everywhere
MOST_MARKERS = 45
LONGEST_LABEL = 30


def new_figure(heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """Panels of these heights (inches) above each other, with one x axis."""
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


def draw_line(axes: Axes, x: Sequence[float], y: Sequence[float], label: str, index: int, **style: Any) -> None:
    """A line in the colour, marker and style of its place; markers only where they can be told apart."""
    marker = MARKERS[index % len(MARKERS)] if len(x) <= MOST_MARKERS else None
    settings = {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index // len(COLOURS) % len(LINES)],
        "marker": marker,
        "markersize": 4,
        "linewidth": 1.6,
        **style,
    }
    axes.plot(x, y, label=label, **settings)


def draw_legend(axes: Axes) -> None:
    """A legend of everything in these axes that has a label."""
    draw_legend_of(axes, *axes.get_legend_handles_labels())


def draw_legend_of(axes: Axes, handles: Sequence[Any], labels: Sequence[Any], *, aside: float = 1.01) -> None:
    """A legend right of the axes, `aside` of their width from their left border."""
    if handles:
        axes.legend(
            handles,
            labels,
            loc="upper left",
            bbox_to_anchor=(aside, 1.0),
            borderaxespad=0,
            frameon=False,
            handlelength=2.6,
            prop={"family": FONT, "size": 9},
        )


def set_title(axes: Axes, title: str, subtitle: str = "", *, above: float = 0) -> None:
    """Title and subtitle at the left, `above` points higher where something stands between them and the axes."""
    if subtitle:
        add_note(axes, subtitle, (0, 1), "axes fraction", above + 6, ha="left")
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", pad=above + (19 if subtitle else 8))


def add_note(axes: Axes, text: str, place: tuple[float, float], coordinates: Any, lift: float, **style: Any) -> None:
    """Small text `lift` points above a place."""
    settings = {"va": "bottom", "fontsize": 9, "color": GREY, "family": FONT, **style}
    axes.annotate(text, place, xycoords=coordinates, xytext=(0, lift), textcoords="offset points", **settings)


def save_figure(figure: Figure, path: PathLike) -> None:
    """Write the picture, all of its text in one font; missing folders are made."""
    for axes in figure.axes:
        for item in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()):
            item.set_fontfamily(FONT)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi="figure", facecolor="white")


def as_number(value: float | None) -> float:
    """What is missing leaves a gap."""
    return math.nan if value is None else float(value)


def short_name(name: str, fallback: str, longest: int = LONGEST_LABEL) -> str:
    """A name that may be a long path: its end is what tells runs apart."""
    return drawable(name if len(name) <= longest else "…" + name[1 - longest :], fallback)


def drawable(text: str, fallback: str) -> str:
    """`text` if the font can show it, else `fallback`; never read as a formula or as a hidden legend entry."""
    if not text.strip() or not _has_glyphs(text):
        text = fallback
    return (" " + text if text.startswith("_") else text).replace("$", r"\$")


def _has_glyphs(characters: Iterable[str]) -> bool:
    return all(character.isprintable() and ord(character) in _font_characters() for character in characters)


@cache
def _font_characters() -> frozenset[int]:
    """Code points the font draws and needs no shaping for: Arabic or Hebrew letters in a row would come out wrong."""
    covered = get_font(findfont(FontProperties(family=FONT))).get_charmap()
    return frozenset(code for code in covered if not 0x0590 <= code <= 0x08FF)
