"""`results.json` with its items, read as typed data and written so that tasks of earlier evaluations stay.

Reading is strict about `results.json` and lenient about the items: without them a table still has its figures, only no
intervals, and `RunResults.problems` says why in one line each.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pivotune.errors import UsageError
from pivotune.results.metrics import Form, Metric
from pivotune.text.files import write_json

RESULTS = "results.json"
ITEMS = "results.items.jsonl.gz"
# What a task's figures depend on; the rest of its entry describes them.
_CONDITIONS = ("split", "origin", "prompt_hash", "template", "limit", "revision", "settings", "versions")

Items = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class MetricResult:
    """One figure of a task; `value` and `stderr` are None where undefined."""

    definition: Metric
    value: float | None
    stderr: float | None
    n: int


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One task of a run.

    Attributes:
        primary: name of the metric that stands for the task.
        conditions: what the figures depend on (split, origin, settings by name), for finding runs measured otherwise.
    """

    name: str
    primary: str
    benchmark: str
    language: str
    metrics: Mapping[str, MetricResult]
    conditions: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunResults:
    """Everything measured of one model.

    Attributes:
        path: the `results.json` read.
        items: task -> item id -> numbers (texts are left out); tasks whose items cannot be trusted are missing.
        problems: one line for each thing that keeps items from being used.
    """

    path: Path
    model: str
    method: str | None
    tasks: Mapping[str, TaskResult]
    items: Mapping[str, Items]
    problems: list[str] = field(default_factory=list)


def results_paths(target: Path) -> tuple[Path, Path]:
    """The two files of a run folder, or of a file such as `base.json` (with `base.items.jsonl.gz` beside it)."""
    if target.suffix == ".json" and not target.is_dir():
        return target, target.with_name(f"{target.stem}.items.jsonl.gz")
    return target / RESULTS, target / ITEMS


def read_results(target: Path) -> RunResults:
    """Read a run folder's results, or a results file's.

    Raises:
        UsageError: there is none, or `results.json` is not what training and evaluation write.
    """
    path, items_path = results_paths(target)
    content = _read_json(path)
    tasks = {name: _parse_task(path, name, entry) for name, entry in content["tasks"].items()}
    problems: list[str] = []
    items = _read_items(items_path, problems) if tasks else {}
    model, method = content.get("model"), content.get("method")
    return RunResults(path, str(model or ""), None if method is None else str(method), tasks, items, problems)


def check_target(target: Path, model: str) -> None:
    """Refuse, before an evaluation, what `write_results` would refuse after it.

    Raises:
        UsageError: the file holds results of another model, or is no results file.
    """
    path, _ = results_paths(target)
    if path.exists():
        _check_model(path, _read_json(path), model)


def write_results(
    target: Path,
    model: str,
    method: str | None,
    tasks: Mapping[str, Mapping[str, Any]],
    items: Iterable[Mapping[str, Any]],
) -> dict[str, Any]:
    """Add tasks with their items to the results of a run folder or file; tasks that are there already and not given stay.

    Each file is replaced whole. A run folder keeps the model and method that training wrote; items that cannot be read are
    moved to a file ending in `.broken` beside the new one.

    Args:
        items: lines of the items file, with `task` and `item`; those of tasks not in `tasks` are refused.

    Returns:
        The whole content of `results.json`.

    Raises:
        UsageError: the file holds results of another model, is no results file, or cannot be written.
    """
    path, items_path = results_paths(target)
    earlier = _read_json(path) if path.exists() else {}
    _check_model(path, earlier, model)
    merged = {"model": model, "method": method, **earlier}
    merged["tasks"] = {**earlier.get("tasks", {}), **tasks}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Items first: if it ends here, the old figures stand beside items that no longer match, which a reader notices.
        _write_lines(items_path, _merged_lines(items_path, tasks, items))
        write_json(path, merged)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error})") from error
    return _read_json(path)


def _check_model(path: Path, content: Mapping[str, Any], model: str) -> None:
    """A run folder's results are that run's, whose `model` is the one it started from."""
    earlier = content.get("model")
    if earlier is None or (path.name == RESULTS and (path.parent / "config.yaml").is_file()):
        return
    if earlier != model and Path(earlier).resolve() != Path(model).resolve():
        raise UsageError(f"{path}: holds results of {earlier}; these are of {model}; write them elsewhere")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file; pivotune train and pivotune evaluate write it") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid JSON ({' '.join(str(error).split())[:120]})") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict):
        found = f"keys {', '.join(map(str, content))}" if isinstance(content, dict) else type(content).__name__
        raise UsageError(f"{path}: no results: expected keys model, method and tasks, found {found[:120]}")
    return content


def _parse_task(path: Path, name: str, entry: Any) -> TaskResult:
    where = f"{path}: task {name}"
    if not isinstance(entry, dict) or not isinstance(entry.get("metric"), str):
        raise UsageError(f"{where}: expected an object with metric, value and n, found {str(entry)[:60]}")
    benchmark, _, language = name.rpartition("_")
    entries = entry.get("metrics")
    if not isinstance(entries, dict) or entry["metric"] not in entries:
        entries = {entry["metric"]: {**_IMPLIED.get(entry["metric"], {}), **entry}, **(entries or {})}
    return TaskResult(
        name=name,
        primary=entry["metric"],
        benchmark=str(entry.get("benchmark") or benchmark or name),
        language=str(entry.get("language") or language),
        metrics={metric: _parse_metric(where, metric, values) for metric, values in entries.items()},
        conditions=flatten({key: entry[key] for key in _CONDITIONS if key in entry}),
    )


# Results of the first releases do not say how a figure was made; training's held-out NLL is the only one there was.
_IMPLIED = {"nll": {"form": "ratio", "fields": ["nll", "tokens"], "higher_is_better": False}}


def _parse_metric(where: str, name: str, entry: Any) -> MetricResult:
    where = f"{where}: metric {name}"
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: expected an object with value, stderr and n, found {str(entry)[:60]}")
    form, fields = entry.get("form", "mean"), entry.get("fields", [name])
    better, scale = entry.get("higher_is_better", True), entry.get("scale", 1.0)
    if form not in get_args(Form):
        raise UsageError(f"{where}: form {form!r} is not known; allowed: {', '.join(get_args(Form))}")
    needed = 2 if form == "ratio" else 1
    if not isinstance(fields, list) or len(fields) != needed or not all(isinstance(key, str) for key in fields):
        raise UsageError(f"{where}: fields {fields!r} are not allowed; {form} takes {needed} name(s)")
    if better not in (True, False, None):
        raise UsageError(f"{where}: higher_is_better {better!r} is not allowed; true, false or null")
    definition = Metric(name, form, tuple(fields), _number(where, "scale", scale) or 1.0, better)
    value, stderr = (_number(where, key, entry.get(key)) for key in ("value", "stderr"))
    return MetricResult(definition, value, stderr, int(_number(where, "n", entry.get("n")) or 0))


def _number(where: str, key: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"{where}: {key} is {str(value)[:40]!r}; a number or null is allowed")
    return float(value) if math.isfinite(value) else None


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}".removeprefix("settings.")
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _read_items(path: Path, problems: list[str]) -> dict[str, Items]:
    """Items by task. A file that breaks off is not used at all, a task with a faulty item not for that task."""
    tasks: dict[str, dict[str, Mapping[str, Any]]] = {}
    faults: dict[str, str] = {}
    number = 0
    try:
        for number, line in _lines(path):
            task, item, record = _parse_item(line)
            own = tasks.setdefault(task, {})
            if item in own:
                faults.setdefault(task, f"line {number}: item {item} of {task} stands twice")
            elif bad := [key for key, value in record.items() if not _is_finite(value)]:
                faults.setdefault(task, f"line {number}: {bad[0]} of item {item} of {task} is not a finite number")
            own[item] = record
    except FileNotFoundError:
        problems.append(f"{path}: no such file: no intervals")
        return {}
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, ValueError) as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        problems.append(f"{path}: cannot be read after line {number} ({reason}): no intervals")
        return {}
    problems += [f"{path}, {fault}: no intervals for {task}" for task, fault in faults.items()]
    return {task: own for task, own in tasks.items() if task not in faults}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _parse_item(line: str) -> tuple[str, str, dict[str, Any]]:
    """Task, id and what may be a number; texts would fill the memory."""
    record = json.loads(line)
    if not isinstance(record, dict) or "task" not in record or "item" not in record:
        raise ValueError(f"expected an object with task and item, found {line[:40].strip()}")
    numbers = {key: value for key, value in record.items() if isinstance(value, (int, float, list))}
    return str(record["task"]), str(record["item"]), {key: numbers[key] for key in numbers if key != "item"}


def _is_finite(value: Any) -> bool:
    """Also for lists, which may hold anything."""
    numbers = value if isinstance(value, list) else [value]
    return all(math.isfinite(number) for number in numbers if isinstance(number, float))


def _merged_lines(path: Path, tasks: Mapping[str, Any], items: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of other tasks as they are, then the new ones."""
    yield from _kept_lines(path, tasks)
    for item in items:
        if item["task"] not in tasks:
            raise ValueError(f"an item of {item['task']}, which is not among the tasks written")
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in item.items()}  # fmt: skip
        yield json.dumps(finite, ensure_ascii=False) + "\n"


def _kept_lines(path: Path, tasks: Mapping[str, Any]) -> list[str]:
    try:
        return [line.rstrip("\n") + "\n" for _, line in _lines(path) if str(json.loads(line)["task"]) not in tasks]
    except FileNotFoundError:
        return []
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError):
        path.replace(path.with_name(f"{path.name}.broken"))
        return []


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    """A whole gzipped file or nothing."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as raw, gzip.open(raw, "wt", 6, "utf-8") as file:
            file.writelines(lines)
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
