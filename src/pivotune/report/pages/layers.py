"""Show the layers: entropy before and after training, translations found, and scores by the supervised layer."""

from __future__ import annotations

import json
from typing import Any

from pivotune.compare.layer_curve import layer_curve, swept_term
from pivotune.report.figures.layers import (
    ends,
    entropy_comparison,
    layer_figure,
    projection_figure,
    retrieval_figure,
    supervised,
    sweep_figure,
)
from pivotune.report.page import Block, Figure, Section, Table, Text
from pivotune.report.runs import LAYERS_AFTER, LAYERS_BEFORE, Material


def layers(material: Material) -> Section | None:
    """Return a figure of each starting model, of all models before and after, and of the translations found."""
    blocks: list[Block] = []
    analyses = {json.dumps(run.layers, sort_keys=True): run for run in material.runs if run.layers}
    for index, run in enumerate(analyses.values(), start=1):
        found = run.layers
        caption = (
            f"The starting model of {run.name}, read at each of its {found['num_layers']} layers; {ends(found)}. "
            "Low entropy: the layer is sure of the next token, in any language."
        )
        sides = {"entropy target": found["target"], "entropy English": found.get("english")}
        columns = {name: side["entropy"] for name, side in sides.items() if side}
        rows = [
            [k, *(None if value is None else f"{value:.3f}" for value in row)]
            for k, row in enumerate(zip(*columns.values(), strict=True))
        ]
        table = Table(["layer", *columns], rows, "Entropy by layer, in nats", numeric=True, folded=True)
        blocks.append(Figure(f"layers-{index}", layer_figure(found).to_dict(), caption, table))
        if found.get("reason"):
            blocks.append(Text(f"Chosen: {found['reason']}", "note"))
    trained = {run.name: run.layers_after for run in material.runs if run.layers_after}
    before = next(({"starting model": run.layers_before} for run in material.runs if run.layers_before), {})
    first = next(iter(analyses.values()), None)
    if trained:
        profiles = {name: found["target"] for name, found in {**before, **trained}.items()}
        marks = first.layers if first else next(iter(trained.values()))
        chart = entropy_comparison(profiles, language=marks.get("language"), **supervised(marks))
        caption = "How sure the layers are after training, and before it where that was measured."
        blocks.append(Figure("layers-after", chart.to_dict(), caption))
    elif first:
        analyze = f"pivotune analyze --data ROWS --model {first.path} --out {first.path / LAYERS_AFTER}"
        missing = f"How training changed the layers is not drawn: no run has a {LAYERS_AFTER}. {analyze} writes it"
        blocks.append(Text(f"{missing}; the starting model's on the same rows belongs into {LAYERS_BEFORE}.", "note"))
    aligned: dict[str, dict[str, Any]] = {}
    for run in material.runs:
        for task, entry in run.entries.items():
            if "by_layer" in entry:
                aligned.setdefault(task, {})[run.name] = entry
    for task, entries in aligned.items():
        by_layer = {name: entry["by_layer"] for name, entry in entries.items()}
        caption = (
            f"{task}: how often a sentence's nearest neighbour in the other language is its own translation, by layer."
        )
        blocks.append(Figure(f"retrieval-{task}", retrieval_figure(by_layer).to_dict(), caption))
        projections = {name: entry["projection"] for name, entry in entries.items() if entry.get("projection")}
        if projections:
            language = str(next(iter(entries.values())).get("language") or "target")
            caption = (
                f"{task}: each sentence's mean state at the layer that finds translations best; a line joins a pair."
            )
            chart = projection_figure(projections, language).to_dict()
            blocks.append(Figure(f"projection-{task}", chart, caption))
    return Section("Layers", blocks) if blocks else None


def layer_sweep(material: Material) -> Section | None:
    """Return scores by the supervised layer (the paper's Figure 3); None where no line has scores at two layers."""
    term = swept_term(material.runs)
    curve = layer_curve(material.runs, term) if term else {"series": []}
    if not any(len(one["points"]) > 1 for one in curve["series"]):
        return None
    margin = "standard deviation over seeds" if curve["errors"] == "seeds" else "95 % interval over items (one seed)"
    caption = (
        f"Scores of runs that differ in the layer of the {term} loss. A bar is the {margin}; a dashed line is TFT with the "
        "same settings. Below stands the entropy of the starting model's layers, where it was measured."
    )
    rows = []
    for one in curve["series"]:
        for point in one["points"]:
            numbers = (point["value"], point["margin"], one["baseline"])
            value, spread, baseline = (None if number is None else f"{number:.4g}" for number in numbers)
            rows.append([one["label"], one["metric"], point["layer"], value, spread, point["seeds"], baseline])
    titles = ["task", "metric", "layer", "score", "±", "seeds", "TFT"]
    table = Table(titles, rows, f"The scores as a table; ± is the {margin}", numeric=True, folded=True)
    return Section("Layer sweep", [Figure("layer-sweep", sweep_figure(curve).to_dict(), caption, table)])
