"""Read run folders for a report: every part that is there, and one line for each part that is not."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pivotune.compare.comparison import ALL, compare_groups
from pivotune.compare.formats import to_dict
from pivotune.compare.seed_groups import SeedGroup, load_groups, natural_order
from pivotune.errors import UsageError
from pivotune.results.files import flatten, parse_metrics, read_entries, results_paths

# Parts of a run folder, and the command that makes each.
# The entropy of the layers of the starting and of the trained model on the same text.
LAYERS_BEFORE, LAYERS_AFTER = "layers-before.json", "layers-after.json"
DATA_CHECK = "data-check.json"
_PARTS = {
    "config.yaml": "pivotune train writes it",
    "environment.json": "pivotune train writes it",
    "metrics.jsonl": "pivotune train writes it",
    "results.json": "pivotune train and pivotune evaluate write it",
    "results.items.jsonl.gz": "written beside results.json; without it there are no intervals and no answers",
}
_MARKS = ("config.yaml", "environment.json", "metrics.jsonl", "results.json", "layers.json")


@dataclass(frozen=True, slots=True)
class RunParts:
    """Content of one run folder, or of one results file.

    Attributes:
        name: unique in the report.
        label: the row of the comparison that the run belongs to; its name where it has no results.
        config: settings by dotted key; empty where there are none.
        layers: `layers.json`, with which training chose its layers.
        layers_before, layers_after: analyses of the starting and of the trained model on the same text.
        metrics: lines of `metrics.jsonl`.
        entries: tasks of `results.json` as they are written.
        missing: one line for each part that is not there or cannot be read.
    """

    name: str
    path: Path
    label: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    layers: Mapping[str, Any]
    layers_before: Mapping[str, Any]
    layers_after: Mapping[str, Any]
    data_check: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    entries: Mapping[str, Mapping[str, Any]]
    missing: Sequence[str]

    @property
    def language(self) -> str:
        language = self.config.get("data.language") or self.layers.get("language") or ""
        return ", ".join(map(str, language)) if isinstance(language, list) else str(language)

    @property
    def sources(self) -> list[str]:
        """Return the names of the files or datasets that were trained on."""
        train = self.config.get("data.train") or []
        entries = train if isinstance(train, list) else [train]
        return [str(entry.get("path") if isinstance(entry, Mapping) else entry) for entry in entries]

    @property
    def steps(self) -> int | None:
        """Return the last step that was logged."""
        return max((line["step"] for line in self.metrics if isinstance(line.get("step"), int)), default=None)

    def items(self) -> Iterator[Mapping[str, Any]]:
        """Yield the records of the items file, up to the first that cannot be read."""
        try:
            with gzip.open(results_paths(self.path)[1], "rt", encoding="utf-8") as file:
                for line in file:
                    record = json.loads(line)
                    if isinstance(record, dict) and "task" in record and "item" in record:
                        yield record
        except (OSError, EOFError, zlib.error, ValueError):
            return


@dataclass(frozen=True, slots=True)
class Material:
    """Everything that a report is made of.

    Attributes:
        comparison: of `pivotune.compare`, as plain data, on all metrics; None where no run has results.
        primary: the metric of each task.
    """

    runs: Sequence[RunParts]
    comparison: Mapping[str, Any] | None = None
    primary: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()

    def cells(self, *metrics: str) -> list[Mapping[str, Any]]:
        """Return the comparison's cells of these metrics, or of every task's primary one."""
        cells = self.comparison["cells"] if self.comparison else []
        return [cell for cell in cells if cell["metric"] in (metrics or (self.primary[cell["task"]],))]


def spread(cell: Mapping[str, Any]) -> float | None:
    """Return the standard deviation over seeds of a comparison's cell, or the standard error of one run."""
    return cell["stderr"] if cell["seed_sd"] is None else cell["seed_sd"]


def read_material(paths: Sequence[Path], *, baseline: str | None = None) -> Material:
    """Read run folders, results files, or folders of run folders.

    Raises:
        UsageError: nothing to read at a path, or an unknown baseline.
    """
    targets = list(dict.fromkeys(target for path in paths for target in _find_targets(path)))
    warnings: list[str] = []
    groups: list[SeedGroup] = []
    with_results = [target for target in targets if _has_results(target)]
    if with_results:
        groups = load_groups(with_results, warnings)
    labels = {run.results.path.resolve(): group.label for group in groups for run in group.runs}
    names = _unique_names(targets)
    runs = [_read_run(target, names[target], labels) for target in targets]
    known = list(dict.fromkeys(labels.values()))
    if baseline is not None and baseline not in known:
        raise UsageError(f"--baseline: {baseline} is no row of the report; the rows are: {', '.join(known) or 'none'}")
    if not any(run.entries for run in runs):
        return Material(runs, warnings=warnings)
    chosen = None if baseline is None else known.index(baseline)
    comparison = to_dict(compare_groups(groups, baseline=chosen, metrics=(ALL,), warnings=warnings))
    primary = {name: str(entry.get("metric")) for run in runs for name, entry in run.entries.items()}
    return Material(runs, comparison, primary, comparison["warnings"])


def _find_targets(path: Path) -> list[Path]:
    """Return the path itself if it holds parts of a run or is a results file, else the folders in it that do."""
    if path.is_file() and path.suffix == ".json":
        return [path]
    if not path.is_dir():
        raise UsageError(
            f"{path}: {'expected a run folder or a results file' if path.exists() else 'no such file or folder'}"
        )
    if _is_run(path):
        return [path]
    children = [*sorted(path.glob("*.json")), *sorted(filter(Path.is_dir, path.iterdir()), key=natural_order)]
    found = [child for child in children if _is_run(child) or (child.is_file() and _has_results(child))]
    if not found:
        raise UsageError(f"{path}: neither a run folder nor a folder of run folders (none of {', '.join(_MARKS)})")
    return found


def _is_run(folder: Path) -> bool:
    # A demo's `results.json` beside its run folders has no tasks.
    marks = [mark for mark in _MARKS if (folder / mark).is_file()]
    return bool(marks) and (marks != ["results.json"] or _has_results(folder))


def _has_results(target: Path) -> bool:
    """Return True for readable results with at least one task."""
    try:
        return bool(read_entries(target))
    except UsageError:
        return False


def _unique_names(targets: Sequence[Path]) -> dict[Path, str]:
    """Return the last part of each path, with as many parents as distinguish it."""
    names = {}
    for target in targets:
        parts = target.resolve().parts
        others = [other.resolve().parts for other in targets if other != target]
        depth = next((d for d in range(1, len(parts)) if all(parts[-d:] != other[-d:] for other in others)), len(parts))
        names[target] = "/".join(parts[-depth:]).removesuffix(".json")
    return names


def _read_run(target: Path, name: str, labels: Mapping[Path, str]) -> RunParts:
    missing: list[str] = []
    folder = target if target.is_dir() else None

    def read(part: str, parse: Any, *, needed: bool = True) -> Any:
        if folder is None:
            return {}
        try:
            content = parse((folder / part).read_text(encoding="utf-8"))
            if isinstance(content, (dict, list)):
                return content
            missing.append(f"{part}: holds no settings")
        except FileNotFoundError:
            if needed:
                missing.append(f"{part}: not there ({_PARTS[part]})")
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            missing.append(f"{part}: cannot be read ({' '.join(str(error).split())[:100]})")
        return {}

    config, environment = flatten(read("config.yaml", yaml.safe_load)), read("environment.json", json.loads)
    names = ("layers.json", LAYERS_BEFORE, LAYERS_AFTER)
    chosen, before, after = (_with_profile(read(part, json.loads, needed=False)) for part in names)
    metrics = read("metrics.jsonl", parse_metrics) or []
    entries: Mapping[str, Any] = {}
    results_file, items_file = results_paths(target)
    try:
        entries = read_entries(target)
    except UsageError as error:
        missing.append(f"results.json: cannot be read ({str(error).removeprefix(f'{results_file}: ')})")
    if not results_file.exists():
        missing.append(f"results.json: not there ({_PARTS['results.json']})")
    elif not items_file.exists():
        missing.append(f"{items_file.name}: not there ({_PARTS['results.items.jsonl.gz']})")
    check = read(DATA_CHECK, json.loads, needed=False)
    label = labels.get(results_file.resolve(), name)
    return RunParts(name, target, label, config, environment, chosen, before, after, check, metrics, entries, missing)


def _with_profile(layers: Any) -> Mapping[str, Any]:
    """Return an analysis that figures can draw, or nothing."""
    needed = ("target", "conversion", "thinking", "method", "model", "num_layers")
    if not isinstance(layers, dict) or not all(key in layers for key in needed):
        return {}
    return layers if isinstance(layers["target"], dict) and layers["target"].get("entropy") else {}
