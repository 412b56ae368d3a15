"""Pages of a report: one file each, a function from the runs' content to a section, or to None without material."""

from __future__ import annotations

from collections.abc import Callable

from pivotune.report.page import Section
from pivotune.report.pages.ablation import ablation
from pivotune.report.pages.configuration import configuration
from pivotune.report.pages.data import data
from pivotune.report.pages.environment import environment
from pivotune.report.pages.layer_sweep import layer_sweep
from pivotune.report.pages.layers import layers
from pivotune.report.pages.reproduction import reproduction
from pivotune.report.pages.samples import samples
from pivotune.report.pages.scores import scores
from pivotune.report.pages.summary import summary
from pivotune.report.pages.training import training
from pivotune.report.runs import Material

# In the order of the report.
PAGES: tuple[Callable[[Material], Section | None], ...] = (
    summary, scores, ablation, layer_sweep, layers, training, samples, data, configuration, environment, reproduction,
)  # fmt: skip
