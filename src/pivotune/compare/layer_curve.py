"""Compute the paper's Figure 3: scores of runs by the supervised layer, with the entropy of the layers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from pivotune.compare.seed_groups import differing_keys, setting_text, settings_key
from pivotune.config.registry import BASELINE_METHOD, METHODS
from pivotune.config.supervision import InnerTerm
from pivotune.results.metrics import ERRORS_OF_95


class TrainedRun(Protocol):
    """A run: its flattened `config.yaml`, its `layers.json` (empty without one) and its tasks as in `results.json`."""

    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def layers(self) -> Mapping[str, Any]: ...
    @property
    def entries(self) -> Mapping[str, Mapping[str, Any]]: ...


class Swept(NamedTuple):
    """A `TrainedRun` of plain values."""

    config: Mapping[str, Any]
    layers: Mapping[str, Any]
    entries: Mapping[str, Mapping[str, Any]]


def swept_term(runs: Sequence[TrainedRun]) -> InnerTerm | None:
    """Return the term whose layer differs between runs that are alike otherwise; thinking if both do, None if neither."""
    terms: tuple[InnerTerm, ...] = ("thinking", "conversion")
    for term in terms:
        if any(len({run.config[f"supervision.{term}.layer"] for run in own}) > 1 for own in _lines(runs, term)):
            return term
    return None


def layer_curve(runs: Sequence[TrainedRun], term: InnerTerm, tasks: Sequence[str] = ()) -> dict[str, Any]:
    """Return the data of `report.figures.layers.sweep_figure` from the runs with results; no `tasks` for all.

    Returns:
        `term`; `errors` (`seeds`: a margin is the standard deviation over seeds; `items`: the 95 % interval of the one
        seed's items); `series`, each with `label`, `metric`, `points` (`layer`, `value`, `margin`, `seeds`) and `baseline`
        (the value of TFT with the same settings, null without such a run); and `layers`, the starting model's layer
        analysis, null where every run names its layers.
    """
    tasks = tasks or tuple(dict.fromkeys(name for run in runs for name in run.entries))
    lines = _lines(runs, term)
    over_seeds = len({run.config.get("seed") for own in lines for run in own}) > 1
    varied = differing_keys([own[0].config for own in lines], f"supervision.{term}.layer")
    series = []
    for own in lines:
        label = ", ".join(setting_text(key, own[0].config.get(key)) for key in varied)
        # TFT trained as these runs are, in every setting that TFT has.
        alike = settings_key(own[0].config, "method", "supervision")
        plain = [run for run in runs if run.config.get("method") == BASELINE_METHOD]
        plain = [run for run in plain if settings_key(run.config, "method", "supervision") == alike]
        for task in tasks:
            by_layer: dict[int, list[Mapping[str, Any]]] = {}
            for run in own:
                layer = run.config[f"supervision.{term}.layer"]
                layer = run.layers.get(term) if layer == "auto" else layer
                if isinstance(layer, int) and (entry := _measured(run, task)):
                    by_layer.setdefault(layer, []).append(entry)
            compared = [entry["value"] for run in plain if (entry := _measured(run, task))]
            if by_layer:
                name, metric = f"{task}, {label}" if label else task, next(iter(by_layer.values()))[0].get("metric")
                points = [_point(layer, found, over_seeds) for layer, found in sorted(by_layer.items())]
                baseline = statistics.fmean(compared) if compared else None
                line = {"task": task, "label": name, "metric": str(metric), "points": points, "baseline": baseline}
                series.append(line)
    layers = next((run.layers for own in lines for run in own if run.layers), None)
    return {"term": term, "errors": "seeds" if over_seeds else "items", "series": series, "layers": layers}


def _lines(runs: Sequence[TrainedRun], term: InnerTerm) -> list[list[TrainedRun]]:
    """Return runs with this term, grouped by all settings but the seed and the term's layer."""
    key = f"supervision.{term}"
    lines: dict[str, list[TrainedRun]] = {}
    for run in (run for run in runs if isinstance(run.config.get(f"{key}.layer"), (int, str))):
        method = str(run.config.get("method"))
        if method in METHODS and METHODS[method].inner_losses and run.config.get(f"{key}.signal") != "none":
            lines.setdefault(settings_key(run.config, f"{key}.layer"), []).append(run)
    return list(lines.values())


def _measured(run: TrainedRun, task: str) -> Mapping[str, Any] | None:
    entry = run.entries.get(task)
    return entry if entry and entry.get("value") is not None else None


def _point(layer: int, entries: Sequence[Mapping[str, Any]], over_seeds: bool) -> dict[str, Any]:
    values, error = [entry["value"] for entry in entries], entries[0].get("stderr")
    margin = None if error is None else ERRORS_OF_95 * error
    if over_seeds:
        margin = statistics.stdev(values) if len(values) > 1 else None
    return {"layer": layer, "value": statistics.fmean(values), "margin": margin, "seeds": len(values)}
