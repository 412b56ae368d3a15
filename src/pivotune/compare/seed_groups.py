"""Find runs and group those that differ in their training seed only; each group is one row of a comparison."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pivotune.errors import UsageError
from pivotune.results.files import RESULTS, RunResults, flatten, read_results, results_paths
from pivotune.results.metrics import MetricResult

# Keys in which runs of one group may differ.
_IDENTITY = frozenset(("seed", "output_dir", "training.run_name"))
_SECTIONS = ("supervision.", "training.", "data.")
_LONGEST_VALUE = 40


@dataclass(frozen=True, slots=True)
class Run:
    """One model's results, with the flattened `config.yaml` of its training; None for a model not trained here."""

    name: str
    results: RunResults
    config: Mapping[str, Any] | None = None

    @property
    def seed(self) -> int | None:
        return None if self.config is None else int(self.config.get("seed") or 0)

    @property
    def method(self) -> str | None:
        return self.results.method or (self.config or {}).get("method")


@dataclass(frozen=True, slots=True)
class SeedGroup:
    """A single run, or runs that differ in seed only, sorted by seed."""

    label: str
    runs: tuple[Run, ...]

    @property
    def method(self) -> str | None:
        return self.runs[0].method

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs if run.seed is not None]

    def figures(self, task: str, metric: str) -> list[tuple[Run, MetricResult]]:
        """Return one metric of one task of every run that has it."""
        entries = [(run, run.results.tasks.get(task)) for run in self.runs]
        return [(run, entry.metrics[metric]) for run, entry in entries if entry is not None and metric in entry.metrics]


def load_groups(paths: Sequence[Path], warnings: list[str]) -> list[SeedGroup]:
    """Load runs and group them, in the order given.

    Args:
        paths: run folders, results files, or folders whose direct children are run folders. Duplicates count once.
        warnings: receives a line for each run that is left out, incomplete or given twice.
    """
    targets: dict[Path, Path] = {}
    for path in paths:
        for target in _find_runs(path, warnings):
            file = results_paths(target)[0].resolve()
            if target == path and file in targets:
                warnings.append(f"{path}: is given more than once, and counts once")
            targets.setdefault(file, target)
    members = _group_by_configuration([_load_run(target, warnings) for target in targets.values()], warnings)
    groups = []
    for own in members:
        rivals = [other[0] for other in members if len(other) > 1 and other[0].method == own[0].method]
        groups.append(SeedGroup(own[0].name if len(own) == 1 else _describe(own[0], rivals), tuple(own)))
    return [_with_unique_label(group, groups) for group in groups]


def find_group(groups: Sequence[SeedGroup], wanted: str) -> int | None:
    """Return the index of the group with this label, or with the run or runs at this path; None if there is none."""
    labels = [group.label for group in groups]
    if wanted in labels:
        return labels.index(wanted)
    path = Path(wanted).expanduser()
    if not path.exists():
        return None
    files = {results_paths(target)[0].resolve() for target in _find_runs(path, [])}
    found = [i for i, group in enumerate(groups) if any(run.results.path.resolve() in files for run in group.runs)]
    if len(found) > 1:
        names = ", ".join(labels[index] for index in found)
        raise UsageError(f"--baseline: {wanted} holds several rows ({names}); name one of them")
    return found[0] if found else None


def short_key(key: str) -> str:
    """Return a configuration key without its section: `thinking.layer`, `learning_rate`."""
    return key.removeprefix(next((section for section in _SECTIONS if key.startswith(section)), ""))


def setting_text(key: str, value: Any) -> str:
    """Return a setting for a label: `learning_rate=0.0001`."""
    text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    short = text if len(text) <= _LONGEST_VALUE else f"...{text[3 - _LONGEST_VALUE :]}"
    return f"{short_key(key)}={short}"


def settings_key(config: Mapping[str, Any], *left_out: str) -> str:
    """Return one text for all configurations that differ in seed, folder, name and the keys or sections `left_out` only."""
    prefixes = tuple(f"{name}." for name in left_out)
    kept = {key: value for key, value in config.items() if key not in _IDENTITY and not f"{key}.".startswith(prefixes)}
    return json.dumps(kept, sort_keys=True, default=str)


def differing_keys(configs: Sequence[Mapping[str, Any]], *left_out: str) -> list[str]:
    """Return the keys whose values differ, without seed, folder, name and the keys `left_out`."""
    keys = dict.fromkeys(key for config in configs for key in config if key not in (*_IDENTITY, *left_out))
    return [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]


def natural_order(path: Path) -> list[tuple[int, int | str]]:
    """Return a key that sorts `layer=5` before `layer=10`."""
    parts = re.findall(r"\d+|\D", f"{path.name}\0")
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


def _find_runs(path: Path, warnings: list[str]) -> list[Path]:
    """Return a results file, a run folder, or the run folders in a folder, `layer=5` before `layer=10`."""

    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    if path.is_file() and path.suffix != ".json":
        raise UsageError(f"{path}: expected a run folder or its {RESULTS}, found a {path.suffix or 'plain'} file")
    if path.is_file() or _is_run(path):
        return [path]
    found = []
    for child in sorted(filter(Path.is_dir, path.iterdir()), key=natural_order):
        if _is_run(child):
            found.append(child)
        elif (child / "config.yaml").is_file():
            warnings.append(f"{child}: has no {RESULTS} yet; left out")
    if not found:
        raise UsageError(f"{path}: no {RESULTS} here nor in the folders in it; pivotune train and evaluate write it")
    return found


def _is_run(folder: Path) -> bool:
    path = folder / RESULTS
    if not path.is_file() or (folder / "config.yaml").is_file():
        return path.is_file()
    try:
        # A demo's `results.json` beside its run folders has no tasks.
        return "tasks" in json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, TypeError):
        return True  # `read_results` names the fault


def _load_run(target: Path, warnings: list[str]) -> Run:
    """Read results, and the configuration beside them or in the run folder of the evaluated model."""
    results = read_results(target)
    warnings.extend(results.problems)
    by_weights: dict[str, list[str]] = defaultdict(list)
    for task in (task for task in results.tasks.values() if task.weights):
        by_weights[task.weights].append(task.name)
    if len(by_weights) > 1:
        found = "; ".join(f"{weights} in {', '.join(names)}" for weights, names in by_weights.items())
        warnings.append(f"{results.path}: its tasks come from different weights ({found}); evaluate them again")
    folder, model = results.path.parent, Path(results.model)
    in_run_folder = results.path.name == RESULTS
    candidates = [folder / "config.yaml"] if in_run_folder else []
    if results.model and model.is_dir():
        candidates += [model / "config.yaml", model.resolve().parent / "config.yaml"]
    path = next(filter(Path.is_file, candidates), None)
    config = None
    if path is not None:
        try:
            # Plain settings: a run of another version may have keys that this version lacks.
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
            if not isinstance(settings, dict):
                raise ValueError("no settings")
            config = flatten(settings)
            int(config.get("seed") or 0)
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            config = None
            warnings.append(f"{path}: cannot be read ({' '.join(str(error).split())[:80]}): its seed is not known")
    return Run(folder.resolve().name if in_run_folder else results.path.stem, results, config)


def _group_by_configuration(runs: Iterable[Run], warnings: list[str]) -> list[list[Run]]:
    """Group runs of one configuration by seed; a second run of the same seed starts another group."""
    groups: list[tuple[str | None, list[Run]]] = []
    for run in runs:
        key = None if run.config is None else settings_key(run.config)
        alike = [group for other, group in groups if key is not None and other == key]
        free = next((group for group in alike if run.seed not in {other.seed for other in group}), None)
        if free is not None:
            free.append(run)
            continue
        if alike:
            both = f"{run.results.path.parent} and {alike[0][0].results.path.parent}"
            warnings.append(
                f"{both} have one configuration and one seed, or a copy was made: shown as rows of their own"
            )
        groups.append((key, [run]))
    return [sorted(group, key=lambda run: run.seed or 0) for _, group in groups]


def _describe(run: Run, rivals: Sequence[Run]) -> str:
    """Return the method, with the few settings that distinguish it from other groups of the same method."""
    configs = [rival.config or {} for rival in rivals]
    keys = differing_keys(configs)
    chosen: list[str] = []

    def kinds(names: Sequence[str]) -> int:
        return len({tuple(str(config.get(name)) for name in names) for config in configs})

    # Greedy: add the key that splits the configurations most, until they are all distinct.
    while keys and kinds(chosen) < len(configs):
        best = max(keys, key=lambda key: kinds([*chosen, key]))
        if kinds([*chosen, best]) == kinds(chosen):
            break
        chosen.append(best)
    details = [setting_text(key, (run.config or {}).get(key)) for key in keys if key in chosen]
    method = run.method or run.name
    return f"{method} ({', '.join(details)})" if details else method


def _with_unique_label(group: SeedGroup, groups: Sequence[SeedGroup]) -> SeedGroup:
    """Prepend as many parent folders as distinguish equal labels."""
    alike = [other.runs[0].results.path for other in groups if other.label == group.label and other is not group]
    if not alike:
        return group
    parts, *rivals = (path.resolve().parent.parts for path in (group.runs[0].results.path, *alike))
    for depth in range(2, len(parts)):
        if parts[-depth:] not in [rival[-depth:] for rival in rivals]:
            return replace(group, label="/".join(parts[-depth:]))
    return replace(group, label=str(group.runs[0].results.path))
