"""Build the report of runs: one page of sections, and its figures as files.

A section is a function from the runs' content, in a file of `pages/`; it returns None without material.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from pivotune.report.figures.base import save_formats
from pivotune.report.page import Figure, Section, asset, render_page
from pivotune.report.pages.ablation import ablation
from pivotune.report.pages.data import data
from pivotune.report.pages.layers import layer_sweep, layers
from pivotune.report.pages.record import configuration, environment, reproduction
from pivotune.report.pages.samples import samples
from pivotune.report.pages.scores import scores
from pivotune.report.pages.summary import summary
from pivotune.report.pages.training import training
from pivotune.report.runs import Material

# In the order of the report.
PAGES: tuple[Callable[[Material], Section | None], ...] = (
    summary, scores, ablation, layer_sweep, layers, training, samples, data, configuration, environment, reproduction,
)  # fmt: skip


def report_sections(material: Material) -> list[Section]:
    """Return the sections that there is material for."""
    return [section for page in PAGES if (section := page(material)) is not None]


def render_report(sections: Sequence[Section], title: str) -> str:
    """Return the report as one HTML file."""
    return render_page(
        title, sections, subtitle=f"Report of Pivotune {version('pivotune')}", scripts=[asset("samples.js")]
    )


def save_figures(sections: Sequence[Section], folder: Path) -> list[Path]:
    """Write every figure of the report as PNG, SVG and PDF; return the paths."""
    figures = [block for section in sections for block in section.blocks if isinstance(block, Figure)]
    return [path for figure in figures for path in save_formats(figure.spec, folder / figure.name)]
