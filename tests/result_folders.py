"""Write run folders with results from plain numbers, as training and evaluation do."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pivotune.results.metrics import Metric, summarize

F1 = Metric("f1", "mean", ("f1",), 100.0)
NLL = Metric("nll_per_token", "ratio", ("gold_nll", "gold_tokens"), higher_is_better=False)
LENGTH = Metric("answer_characters", "mean", ("answer_characters",), higher_is_better=None)


def records(values: Sequence[float | None], key: str = "f1") -> list[dict[str, Any]]:
    """Return items with one number each, named by their index."""
    return [{"item": f"q{index:04d}", key: value} for index, value in enumerate(values)]


def entry(items: Sequence[Mapping[str, Any]], metrics: Sequence[Metric] = (F1,), **changes: Any) -> dict[str, Any]:
    """Return a task's entry in `results.json`, as evaluation writes it."""
    figures = {metric.name: summarize(metric, items).to_dict() for metric in metrics}
    first = figures[metrics[0].name]
    top = {key: first[key] for key in ("value", "stderr", "n", "higher_is_better")}
    return {"metric": metrics[0].name, **top, "metrics": figures, **changes}


def write_run(
    folder: Path,
    tasks: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    metrics: Sequence[Metric] = (F1,),
    method: str | None = "tft",
    seed: int | None = 0,
    config: Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run folder with results; without a seed it has no `config.yaml`, like that of an evaluated base model."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, items in tasks.items():
        benchmark, _, language = name.rpartition("_")
        facts = {"benchmark": benchmark, "language": language, "split": "validation", **(changes or {})}
        entries[name] = entry(items, metrics, **facts)
    results = {"model": "owner/base", "method": method, "tasks": entries}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    write_items(folder / "results.items.jsonl.gz", tasks)
    if seed is not None:
        settings = {"model": "owner/base", "method": method, "output_dir": str(folder), "seed": seed, **(config or {})}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder


def write_items(path: Path, tasks: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for name, items in tasks.items():
            file.writelines(json.dumps({"task": name, **item}) + "\n" for item in items)


def change_results(folder: Path, change: Any) -> None:
    """Edit `results.json` in place; `change` takes its content."""
    path = folder / "results.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
