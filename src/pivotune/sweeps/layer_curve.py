"""Compute the paper's Figure 3: scores of a sweep by the supervised layer, with the entropy of the layers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from pivotune.config.registry import BASELINE_METHOD
from pivotune.layers.layers_json import read_layers_json
from pivotune.layers.selection import TermName
from pivotune.results.files import read_entries
from pivotune.sweeps.plan import Cell
from pivotune.sweeps.run import Sweep

_CONFIDENCE = 1.96  # standard errors on either side: 95 %


def swept_term(cells: Iterable[Cell]) -> TermName | None:
    """Return the term whose layer the grid varies; the thinking term if it varies both, None if neither."""
    keys = {key for cell in cells for option in cell.options for key in option.keys}
    terms: tuple[TermName, ...] = ("thinking", "conversion")
    return next((term for term in terms if f"supervision.{term}.layer" in keys), None)


def layer_curve(sweep: Sweep, term: TermName) -> dict[str, Any]:
    """Return the data of `plot_layer_sweep` from the finished cells.

    Returns:
        `term`; `errors` (`seeds`: a margin is the standard deviation over seeds; `items`: the 95 % interval of the one
        seed's items); `series`, each with `label`, `metric`, `points` (`layer`, `value`, `margin`, `seeds`) and `baseline`
        (TFT's value, null where the sweep holds no TFT); and `layers`, the starting model's layer analysis, null where
        every cell names its layers.
    """
    folders = {cell.name: cell.folder for cell in sweep.cells if (cell.folder / "layers.json").is_file()}
    analyses = {name: read_layers_json(folder / "layers.json") for name, folder in folders.items()}
    supervised: dict[str, Any] = {name: analysis[term] for name, analysis in analyses.items()}
    for cell in sweep.cells:
        named = getattr(cell.config.supervision, term).layer
        if named != "auto":
            supervised[cell.name] = named
    entries = {cell.name: read_entries(cell.folder) for cell in sweep.cells}
    tasks = sweep.tasks or tuple(dict.fromkeys(name for own in entries.values() for name in own))
    lines: dict[str, list[Cell]] = {}
    for cell in sweep.cells:
        others = [option for option in cell.options if f"supervision.{term}.layer" not in option.keys]
        if cell.name in supervised and len(others) < len(cell.options):
            label = ", ".join(option.label for option in others if option.keys != ("method",))
            lines.setdefault(label, []).append(cell)
    over_seeds = len({cell.seed for cells in lines.values() for cell in cells}) > 1
    series = []
    for label, cells in lines.items():
        own = {option.label for option in cells[0].options}
        # TFT trained as these cells are, in every option that TFT has.
        baselines = [cell for cell in sweep.cells if cell.config.method == BASELINE_METHOD]
        baselines = [c for c in baselines if own.issuperset(o.label for o in c.options if "method" not in o.keys)]
        for task in tasks:
            measured = {cell.name: entry for cell in (*cells, *baselines) if (entry := entries[cell.name].get(task))}
            measured = {name: entry for name, entry in measured.items() if entry["value"] is not None}
            by_layer: dict[int, list[dict[str, Any]]] = {}
            for cell in (cell for cell in cells if cell.name in measured):
                by_layer.setdefault(supervised[cell.name], []).append(measured[cell.name])
            compared = [measured[cell.name]["value"] for cell in baselines if cell.name in measured]
            if by_layer:
                name, metric = f"{task}, {label}" if label else task, next(iter(by_layer.values()))[0]["metric"]
                points = [_point(layer, found, over_seeds) for layer, found in sorted(by_layer.items())]
                baseline = statistics.fmean(compared) if compared else None
                line = {"task": task, "label": name, "metric": metric, "points": points, "baseline": baseline}
                series.append(line)
    errors, layers = "seeds" if over_seeds else "items", next(iter(analyses.values()), None)
    return {"term": term, "errors": errors, "series": series, "layers": layers}


def _point(layer: int, entries: list[dict[str, Any]], over_seeds: bool) -> dict[str, Any]:
    values, error = [entry["value"] for entry in entries], entries[0].get("stderr")
    margin = None if error is None else _CONFIDENCE * error
    if over_seeds:
        margin = statistics.stdev(values) if len(values) > 1 else None
    return {"layer": layer, "value": statistics.fmean(values), "margin": margin, "seeds": len(values)}
