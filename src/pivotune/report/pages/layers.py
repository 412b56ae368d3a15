"""What each layer can say: the entropy of the layers before and after training, and translations found by layer."""

from __future__ import annotations

import json

from pivotune.report.figures.layers import entropy_comparison, layer_figure, retrieval_figure
from pivotune.report.page import Block, Figure, Section, Table, Text
from pivotune.report.runs import LAYERS_AFTER, Material


def layers(material: Material) -> Section | None:
    """Return a figure of each starting model, of all models before and after, and of the translations found."""
    blocks: list[Block] = []
    analyses = {json.dumps(run.layers, sort_keys=True): run for run in material.runs if run.layers}
    for index, run in enumerate(analyses.values(), start=1):
        found = run.layers
        caption = (
            f"The starting model of {run.name}, read at every layer. Conversion to English ends at layer i = "
            f"{found['conversion']}, thinking at layer j = {found['thinking']} of {found['num_layers']}. "
            "Low entropy: the layer is sure of the next token, in whatever language."
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
    trained = [run for run in material.runs if run.layers_after]
    if trained:
        profiles = {"starting model": next((run.layers["target"] for run in material.runs if run.layers), None)}
        profiles |= {run.name: run.layers_after["target"] for run in trained}
        known = {name: profile for name, profile in profiles.items() if profile}
        marks = next((run.layers for run in material.runs if run.layers), trained[0].layers_after)
        chart = entropy_comparison(
            known, language=trained[0].language or None, conversion=marks["conversion"], thinking=marks["thinking"]
        )
        blocks.append(
            Figure(
                "layers-after", chart.to_dict(), "Entropy of the layers before and after training, on the same text."
            )
        )
    elif analyses:
        first = next(iter(analyses.values()))
        blocks.append(
            Text(
                f"How training changed the layers is not drawn: no run has a {LAYERS_AFTER}. pivotune analyze --model "
                f"{first.path} --data ROWS --out {first.path / LAYERS_AFTER} writes it.",
                "note",
            )
        )
    for task in dict.fromkeys(
        name for run in material.runs for name, entry in run.entries.items() if "by_layer" in entry
    ):
        by_layer = {run.name: run.entries[task]["by_layer"] for run in material.runs if task in run.entries}
        caption = (
            f"{task}: how often a sentence's nearest neighbour in the other language is its own translation, by layer."
        )
        blocks.append(Figure(f"retrieval-{task}", retrieval_figure(by_layer).to_dict(), caption))
    return Section("Layers", blocks) if blocks else None


_KEYS = {"target": "target", "English": "english"}
