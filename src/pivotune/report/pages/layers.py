"""Show the entropy of the layers before and after training, and the retrieval of translations by layer."""

from __future__ import annotations

import json

from pivotune.report.figures.layers import ends, entropy_comparison, layer_figure, retrieval_figure, supervised
from pivotune.report.figures.projection import projection_figure
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
        names = ["layer", *(f"entropy {language}" for language in ("target", "English") if found.get(_KEYS[language]))]
        columns = [
            found[_KEYS[language]]["entropy"] for language in ("target", "English") if found.get(_KEYS[language])
        ]
        rows = [
            [k, *(None if value is None else f"{value:.3f}" for value in row)]
            for k, row in enumerate(zip(*columns, strict=True))
        ]
        table = Table(names, rows, "Entropy by layer, in nats", numeric=True, folded=True)
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
    for task in dict.fromkeys(
        name for run in material.runs for name, entry in run.entries.items() if "by_layer" in entry
    ):
        by_layer = {run.name: run.entries[task]["by_layer"] for run in material.runs if task in run.entries}
        caption = (
            f"{task}: how often a sentence's nearest neighbour in the other language is its own translation, by layer."
        )
        blocks.append(Figure(f"retrieval-{task}", retrieval_figure(by_layer).to_dict(), caption))
        entries = {run.name: run.entries[task] for run in material.runs if task in run.entries}
        projections = {name: entry["projection"] for name, entry in entries.items() if entry.get("projection")}
        if projections:
            language = str(next(iter(entries.values())).get("language") or "target")
            caption = (
                f"{task}: each sentence's mean state at the layer that finds translations best; a line joins a pair."
            )
            chart = projection_figure(projections, language).to_dict()
            blocks.append(Figure(f"projection-{task}", chart, caption))
    return Section("Layers", blocks) if blocks else None


_KEYS = {"target": "target", "English": "english"}
