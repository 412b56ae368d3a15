"""The ablation table (the paper's Table 3), of runs that differ in what is supervised."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pivotune.compare.seed_groups import differing_keys, setting_text, settings_key
from pivotune.config.registry import BASELINE_METHOD
from pivotune.report.page import Section, Text
from pivotune.report.pages.summary import comparison_table
from pivotune.report.runs import Material

# Settings that turn a part of the method on, off or into another.
_PARTS = re.compile(r"method|supervision\.((conversion|thinking)\.signal|lens|\w+\.gradient|balance\.mode)")


def ablation(material: Material) -> Section | None:
    """Return one row for each variant of the supervision, trained alike otherwise; None for fewer than two beside TFT."""
    configs = {run.label: run.config for run in material.runs if run.config}
    if material.comparison is None or not configs:
        return None
    baseline = material.comparison["baseline"]
    measured = dict.fromkeys(cell["row"] for cell in material.cells())
    # The differences are to the baseline: only rows with its other settings belong into the table.
    wanted = settings_key(configs.get(baseline) or next(iter(configs.values())), "method", "supervision")
    alike = {label for label, config in configs.items() if settings_key(config, "method", "supervision") == wanted}
    configs = {label: config for label, config in configs.items() if label in alike.intersection(measured)}
    variants = [config for config in configs.values() if config.get("method") != BASELINE_METHOD]
    varied = [key for key in differing_keys(variants) if key.startswith("supervision.") or key == "method"]
    if not any(map(_PARTS.fullmatch, varied)):
        return None
    names: dict[str, str] = {}
    for label, config in sorted(configs.items(), key=lambda pair: _order(pair[1])):
        is_tft = config.get("method") == BASELINE_METHOD
        name = "TFT" if is_tft else ", ".join(setting_text(key, config.get(key)) for key in varied)
        names[label] = f"{name} ({label})" if name in names.values() else name
    cells = [
        {**cell, "row": name} for label, name in names.items() for cell in material.cells() if cell["row"] == label
    ]
    against = names.get(baseline, baseline)
    caption = f"Difference to {against} with its 95 % interval: ▲ better, ▼ worse, ≈ not told apart"
    table = comparison_table({**material.comparison, "baseline": against}, cells, caption)
    said = Text("The runs differ in what is supervised. A row is named by the settings that differ.")
    return Section("Ablation", [said, table])


def _order(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Order TFT, conversion alone, thinking alone, both."""
    signals = (config.get(f"supervision.{term}.signal") != "none" for term in ("thinking", "conversion"))
    return config.get("method") != BASELINE_METHOD, *signals
