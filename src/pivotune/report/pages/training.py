"""The course of training: loss terms, gradient shares and held-out likelihood over the steps."""

from __future__ import annotations

from pivotune.report.figures.training import training_figure
from pivotune.report.page import Block, Figure, Section, Table
from pivotune.report.runs import Material

_MOST_RUNS = 6  # in one figure; more lines hide each other


def training(material: Material) -> Section | None:
    """Return figures of all runs that logged steps, and a table of their last values."""
    runs = [run for run in material.runs if run.metrics]
    if not runs:
        return None
    blocks: list[Block] = []
    for first in range(0, len(runs), _MOST_RUNS):
        some = {run.name: run.metrics for run in runs[first : first + _MOST_RUNS]}
        name = f"training-{first // _MOST_RUNS + 1}" if len(runs) > _MOST_RUNS else "training"
        caption = (
            "Loss terms over the optimizer steps, each as its own mean per token; then the inner gradients as a share of "
            "the task's where they were measured, and the negative log-likelihood of held-out answers (lower is better)."
        )
        blocks.append(Figure(name, training_figure(some).to_dict(), caption))
    keys = ("loss", "tft_loss", "conversion_loss", "thinking_loss", "eval_target_nll", "eval_english_nll")
    rows = []
    for run in runs:
        last = {key: line[key] for line in run.metrics for key in keys if isinstance(line.get(key), (int, float))}
        rows.append([run.name, run.steps, *(f"{last[key]:.3f}" if key in last else None for key in keys)])
    titles = ["run", "steps", "total loss", "answer (TFT)", "conversion", "thinking", "held-out NLL", "in English"]
    blocks.append(Table(titles, rows, "The last value that each run logged.", numeric=True))
    return Section("Training", blocks)
