"""The settings in which the runs differ, and each run's whole configuration."""

from __future__ import annotations

from typing import Any

import yaml

from pivotune.report.page import Block, Section, Table, Text, html, shown
from pivotune.report.runs import Material


def configuration(material: Material) -> Section | None:
    """Return a table of the keys whose values differ, without the runs' own folders."""
    runs = [run for run in material.runs if run.config]
    if not runs:
        return None
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "output_dir")
    differing = [key for key in keys if len({_text(run.config.get(key)) for run in runs}) > 1]
    blocks: list[Block] = []
    if len(runs) == 1:
        blocks.append(Text("One run: nothing to compare its settings with."))
    elif differing:
        rows = [[key, *(_text(run.config.get(key)) for run in runs)] for key in differing]
        caption = f"{len(differing)} of {len(keys)} settings differ."
        blocks.append(Table(["setting", *(run.name for run in runs)], rows, caption))
    else:
        blocks.append(Text("The runs have the same settings."))
    for run in runs:
        settings = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
        details = "<details><summary dir='auto'>All settings of {}</summary><pre class='scroll'>{}</pre></details>"
        blocks.append(html(details, run.name, shown(settings)))
    return Section("Configuration", blocks)


def _text(value: Any) -> str:
    return "none" if value is None else str(value)
