"""Figure of a run's training: every loss term, the shares of the gradients and the held-out likelihood over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from pivotune.report.figures.base import lines, series, stacked
from pivotune.report.figures.layers import note

_LABELS = {
    "loss": "total", "tft_loss": "answer (TFT)", "conversion_loss": "conversion", "thinking_loss": "thinking",
    "eval_nll": "held-out", "eval_loss": "held-out", "eval_target_nll": "target language", "eval_english_nll": "English",
}  # fmt: skip
_INNER = ("conversion_loss", "thinking_loss")
_TITLES = {
    "training": ["training loss", "(nats per token)"],
    "inner": ["inner loss (nats per", "token, or 1 − cosine)"],
    "gradients": ["inner gradient as a", "share of the task's"],
    "heldout": ["held-out answer NLL", "(nats per token)"],
}


def training_figure(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> alt.VConcatChart:
    """Return loss terms, gradient shares and held-out likelihood over the steps, a panel for each kind that was logged.

    Args:
        runs: name -> lines of `metrics.jsonl`: `step` with keys that end in `loss`, `_nll` or `_gradient_share`.
    """
    lines_by_run = {name: [line for line in metrics if "step" in line] for name, metrics in runs.items()}
    logged = list(dict.fromkeys(key for metrics in lines_by_run.values() for line in metrics for key in line))
    losses = [key for key in logged if f"_{key}".endswith("_loss") and not key.startswith(("eval_", "train_"))]
    heldout = [[key for key in logged if key.startswith("eval_") and key.endswith(end)] for end in ("_nll", "_loss")]
    kinds = {
        "training": [key for key in losses if key not in _INNER],
        "inner": [key for key in losses if key in _INNER],
        "gradients": [key for key in logged if key.endswith("_gradient_share")],
        "heldout": heldout[0] or heldout[1],
    }
    panels = []
    for kind, keys in kinds.items():
        rows = [
            {"step": line["step"], "value": line[key], "term": _label(key), "run": run}
            for run, metrics in lines_by_run.items()
            for key in keys
            for line in metrics
            if key in line
        ]
        if rows:
            for row in rows:
                row["series"] = row["term"] if len(runs) == 1 else f"{row['run']}: {row['term']}"
            x = alt.X("step:Q", title="optimizer step", axis=alt.Axis(tickMinStep=1))
            y = alt.Y("value:Q", title=_TITLES[kind], scale=alt.Scale(zero=kind == "gradients"))
            panels.append(lines(rows, x, y, series("series", [row["series"] for row in rows]), 150))
    return stacked(panels or [note("no loss was logged")], "Training")


def _label(key: str) -> str:
    name = key.removeprefix("eval_").removesuffix("_gradient_share").removesuffix("_nll").replace("_", " ").strip()
    return _LABELS.get(key) or name or "other"
