"""Which results make one row of a comparison: a single run, or several that differ in their training seed only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pivotune.errors import UsageError
from pivotune.results.files import RESULTS, RunResults, flatten, read_results, results_paths

# What makes two runs of one configuration two runs.
_IDENTITY = frozenset(("seed", "output_dir", "training.run_name"))
_SECTIONS = ("supervision.", "training.", "data.")
_LONGEST_VALUE = 40


@dataclass(frozen=True, slots=True)
class Run:
    """One model's results, with the configuration it was trained with.

    Attributes:
        config: content of the run's `config.yaml`, keys joined by points; None for a model that was not trained here.
    """

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
class Row:
    """A row of a comparison: runs that differ in seed only, by seed."""

    label: str
    runs: tuple[Run, ...]

    @property
    def method(self) -> str | None:
        return self.runs[0].method

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs if run.seed is not None]


def load_rows(paths: Sequence[Path], warnings: list[str]) -> list[Row]:
    """Rows of the given runs, in the order given.

    Args:
        paths: run folders, results files, or folders whose direct children are run folders. One given twice counts once.
        warnings: takes a line for each run that is left out or not what it seems.

    Raises:
        UsageError: a path that is none of these, or a results file that cannot be read.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        for target in expand(path, warnings):
            file = results_paths(target)[0].resolve()
            if file not in runs:
                runs[file] = _load_run(target, warnings)
    return _label(_group(runs.values(), warnings))


def expand(path: Path, warnings: list[str]) -> list[Path]:
    """The run folders or the results file that a path stands for."""
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    if path.is_file():
        if path.suffix != ".json":
            raise UsageError(f"{path}: expected a run folder or its {RESULTS}, found a {path.suffix or 'plain'} file")
        return [path]
    if _is_run(path):
        return [path]
    children = [child for child in sorted(path.iterdir(), key=_natural) if child.is_dir()]
    for child in children:
        if not _is_run(child) and (child / "config.yaml").is_file():
            warnings.append(f"{child}: has no {RESULTS} yet; left out")
    found = [child for child in children if _is_run(child)]
    if not found:
        raise UsageError(f"{path}: no {RESULTS} here nor in the folders in it; pivotune train and evaluate write it")
    return found


def find_row(rows: Sequence[Row], wanted: str) -> int | None:
    """Index of the row with this label, or of the one that holds the run or runs at this path; None if there is none.

    Raises:
        UsageError: the path is a folder of runs that are in several rows.
    """
    labels = [row.label for row in rows]
    if wanted in labels:
        return labels.index(wanted)
    path = Path(wanted).expanduser()
    if not path.exists():
        return None
    files = {results_paths(target)[0].resolve() for target in expand(path, [])}
    found = [index for index, row in enumerate(rows) if any(run.results.path.resolve() in files for run in row.runs)]
    if len(found) > 1:
        names = ", ".join(labels[index] for index in found)
        raise UsageError(f"--baseline: {wanted} holds several rows ({names}); name one of them")
    return found[0] if found else None


def _is_run(folder: Path) -> bool:
    """A demo's `results.json` beside its run folders has no tasks."""
    path = folder / RESULTS
    if not path.is_file():
        return False
    if (folder / "config.yaml").is_file():
        return True
    try:
        return "tasks" in json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, TypeError):
        # Reading it again will say what is wrong.
        return True


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """`layer=5` before `layer=10`."""
    parts: list[tuple[int, int | str]] = []
    digits = ""
    for character in f"{path.name}\0":
        if character.isdecimal():
            digits += character
            continue
        if digits:
            parts.append((0, int(digits)))
            digits = ""
        parts.append((1, character))
    return parts


def _load_run(target: Path, warnings: list[str]) -> Run:
    results = read_results(target)
    warnings.extend(results.problems)
    path = results.path
    folder = path.parent.resolve()
    name = folder.name if path.name == RESULTS else path.stem
    for candidate in _config_candidates(results):
        if candidate.is_file():
            return Run(name, results, _read_config(candidate, warnings))
    return Run(name, results)


def _config_candidates(results: RunResults) -> Iterator[Path]:
    """Beside the results, or in the run folder that was evaluated into a file elsewhere."""
    if results.path.name == RESULTS:
        yield results.path.parent / "config.yaml"
    model = Path(results.model)
    if results.model and model.is_dir():
        yield model / "config.yaml"
        yield model.resolve().parent / "config.yaml"


def _read_config(path: Path, warnings: list[str]) -> dict[str, Any] | None:
    """Only as plain settings: a run of another version may have keys that this one does not know."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("no settings")
        config = flatten(settings)
        int(config.get("seed") or 0)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        warnings.append(f"{path}: cannot be read ({' '.join(str(error).split())[:80]}): its seed is not known")
        return None
    return config


def _group(runs: Iterable[Run], warnings: list[str]) -> list[list[Run]]:
    """Runs of one configuration together; of two with the same seed the second starts a row of its own."""
    groups: list[tuple[str | None, list[Run]]] = []
    for run in runs:
        key = _key(run)
        alike = [group for other, group in groups if key is not None and other == key]
        free = next((group for group in alike if run.seed not in {other.seed for other in group}), None)
        if free is not None:
            free.append(run)
            continue
        if alike:
            warnings.append(
                f"{run.results.path.parent} and {alike[0][0].results.path.parent} have one configuration and one seed, "
                "or a copy was made: shown as rows of their own"
            )
        groups.append((key, [run]))
    return [sorted(group, key=lambda run: run.seed or 0) for _, group in groups]


def _key(run: Run) -> str | None:
    if run.config is None:
        return None
    settings = {name: value for name, value in run.config.items() if name not in _IDENTITY}
    return json.dumps(settings, sort_keys=True, default=str)


def _label(groups: Sequence[list[Run]]) -> list[Row]:
    """Single runs by their folder's name, groups by method and what tells them from groups of the same method."""
    rows = []
    for runs in groups:
        rivals = [other[0] for other in groups if len(other) > 1 and other[0].method == runs[0].method]
        label = runs[0].name if len(runs) == 1 else _describe(runs[0], rivals)
        rows.append(Row(label, tuple(runs)))
    return [_unique(row, rows) for row in rows]


def _describe(run: Run, rivals: Sequence[Run]) -> str:
    config = run.config or {}
    method = run.method or run.name
    keys = _distinguishing([rival.config or {} for rival in rivals])
    details = ", ".join(f"{_short(key)}={_value(config.get(key))}" for key in keys)
    return f"{method} ({details})" if details else method


def _distinguishing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Few keys that together tell the configurations apart: again and again the one that splits them most."""
    keys = [key for key in dict.fromkeys(key for config in configs for key in config) if key not in _IDENTITY]
    chosen: list[str] = []

    def kinds(names: Sequence[str]) -> int:
        return len({tuple(str(config.get(name)) for name in names) for config in configs})

    while kinds(chosen) < len(configs):
        best = max(keys, key=lambda key: kinds([*chosen, key]))
        if kinds([*chosen, best]) == kinds(chosen):
            break
        chosen.append(best)
    return [key for key in keys if key in chosen]


def _short(key: str) -> str:
    section = next((section for section in _SECTIONS if key.startswith(section)), "")
    return key.removeprefix(section)


def _value(value: Any) -> str:
    text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _LONGEST_VALUE else f"...{text[3 - _LONGEST_VALUE :]}"


def _unique(row: Row, rows: Sequence[Row]) -> Row:
    """With as many parent folders as it takes to tell equal names apart."""
    rivals = [other for other in rows if other.label == row.label and other is not row]
    if not rivals:
        return row
    parts = row.runs[0].results.path.resolve().parent.parts
    for depth in range(2, len(parts)):
        if all(other.runs[0].results.path.resolve().parent.parts[-depth:] != parts[-depth:] for other in rivals):
            return replace(row, label="/".join(parts[-depth:]))
    return replace(row, label=str(row.runs[0].results.path))
