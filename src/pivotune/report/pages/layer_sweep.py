"""Scores by the supervised layer (the paper's Figure 3), of runs that differ in that layer."""

from __future__ import annotations

from pivotune.compare.layer_curve import layer_curve, swept_term
from pivotune.report.figures.layers import sweep_figure
from pivotune.report.page import Figure, Section, Table
from pivotune.report.runs import Material


def layer_sweep(material: Material) -> Section | None:
    """Return the figure with its numbers; None where no line has scores at two layers."""
    term = swept_term(material.runs)
    curve = layer_curve(material.runs, term) if term else {"series": []}
    if not any(len(one["points"]) > 1 for one in curve["series"]):
        return None
    margin = "standard deviation over seeds" if curve["errors"] == "seeds" else "95 % interval over items (one seed)"
    caption = (
        f"Scores of runs that differ in the layer of the {term} loss. A bar is the {margin}; a dashed line is TFT with the "
        "same settings. Below stands the entropy of the starting model's layers, where it was measured."
    )
    rows = [
        [
            one["label"],
            one["metric"],
            point["layer"],
            *(None if value is None else f"{value:.4g}" for value in (point["value"], point["margin"])),
            point["seeds"],
            None if one["baseline"] is None else f"{one['baseline']:.4g}",
        ]
        for one in curve["series"]
        for point in one["points"]
    ]
    titles = ["task", "metric", "layer", "score", "±", "seeds", "TFT"]
    table = Table(titles, rows, f"The scores as a table; ± is the {margin}", numeric=True, folded=True)
    return Section("Layer sweep", [Figure("layer-sweep", sweep_figure(curve).to_dict(), caption, table)])
