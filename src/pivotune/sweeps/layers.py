"""The paper's Figure 3 as numbers: scores of a sweep by the layer that was supervised, beside the entropy of the layers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pivotune.config.registry import METHODS
from pivotune.layers.analysis import LayerAnalysis, read_layers_json
from pivotune.layers.selection import Term
from pivotune.sweeps.plan import Cell
from pivotune.sweeps.run import Sweep
from pivotune.sweeps.state import read_entries

_CONFIDENCE = 1.96  # standard errors on either side: 95 %

# A task's value and its standard error over items.
Score = tuple[float, float | None]


def swept_term(cells: Iterable[Cell]) -> Term | None:
    """Whose layer the grid is over; the thinking layer where it is over both; None where it is over neither."""
    keys = {key for cell in cells for option in cell.options for key in option.keys}
    terms: tuple[Term, ...] = ("thinking", "conversion")
    return next((term for term in terms if f"supervision.{term}.layer" in keys), None)


def layer_curve(sweep: Sweep, term: Term) -> dict[str, Any]:
    """What `plot_layer_sweep` draws, from the cells that are finished.

    Returns:
        `term`; `errors` (`seeds`: a margin is the standard deviation over seeds; `items`: the 95 % interval of the one
        seed's items); `series`, each with `label`, `metric`, `points` (`layer`, `value`, `margin`, `seeds`) and `baseline`
        (TFT's value, null where the sweep holds no TFT); and `layers`, the starting model's layer analysis.
    """
    analyses = {cell.name: read_layers_json(cell.folder / "layers.json") for cell in sweep.cells if _has_layers(cell)}
    entries = {cell.name: read_entries(cell.folder) for cell in sweep.cells}
    supervised = [cell for cell in sweep.cells if cell.name in analyses and _label(cell, term) is not None]
    baselines = [cell for cell in sweep.cells if cell.config.method == "tft"]
    tasks = sweep.tasks or tuple(dict.fromkeys(name for own in entries.values() for name in own))
    seeds = {cell.seed for cell in supervised}
    series = [
        _series(task, label, group, baselines, analyses, entries, term, over_seeds=len(seeds) > 1)
        for label, group in _grouped(supervised, term).items()
        for task in tasks
    ]
    return {
        "term": term,
        "errors": "seeds" if len(seeds) > 1 else "items",
        "series": [one for one in series if one["points"]],
        "layers": next(iter(analyses.values()), None),
    }


def _series(
    task: str,
    label: str,
    cells: Sequence[Cell],
    baselines: Sequence[Cell],
    analyses: Mapping[str, LayerAnalysis],
    entries: Mapping[str, Mapping[str, Any]],
    term: Term,
    *,
    over_seeds: bool,
) -> dict[str, Any]:
    by_layer: dict[int, list[Score]] = {}
    metric = None
    for cell in cells:
        entry = entries[cell.name].get(task)
        if entry is not None and entry["value"] is not None:
            by_layer.setdefault(analyses[cell.name][term], []).append((entry["value"], entry.get("stderr")))
            metric = entry["metric"]
    compared = [entries[cell.name].get(task) for cell in baselines if _is_baseline_of(cell, cells[0])]
    values = [entry["value"] for entry in compared if entry is not None and entry["value"] is not None]
    return {
        "task": task,
        "label": f"{task}, {label}" if label else task,
        "metric": metric,
        "points": [_point(layer, scores, over_seeds) for layer, scores in sorted(by_layer.items())],
        "baseline": statistics.fmean(values) if values else None,
    }


def _point(layer: int, scores: Sequence[Score], over_seeds: bool) -> dict[str, Any]:
    values = [value for value, _ in scores]
    if over_seeds:
        margin = statistics.stdev(values) if len(values) > 1 else None
    else:
        error = scores[0][1]
        margin = None if error is None else _CONFIDENCE * error
    return {"layer": layer, "value": statistics.fmean(values), "margin": margin, "seeds": len(values)}


def _grouped(cells: Iterable[Cell], term: Term) -> dict[str, list[Cell]]:
    """Cells that differ in layer and seed only, by what else was varied."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(str(_label(cell, term)), []).append(cell)
    return groups


def _label(cell: Cell, term: Term) -> str | None:
    """What else than layer, seed and method the cell varies; None where its layer is not one of the grid's."""
    others = [option for option in cell.options if f"supervision.{term}.layer" not in option.keys]
    if len(others) == len(cell.options):
        return None
    return ", ".join(option.label for option in others if option.keys != ("method",))


def _is_baseline_of(baseline: Cell, cell: Cell) -> bool:
    """Whether TFT was trained as this cell was, in everything that TFT has."""
    own = {option.label for option in cell.options}
    return all(option.label in own for option in baseline.options if "method" not in option.keys)


def _has_layers(cell: Cell) -> bool:
    return METHODS[cell.config.method].inner_losses and (cell.folder / "layers.json").is_file()
