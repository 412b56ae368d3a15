"""Read and write `results.json` and its items file.

Reading is strict about `results.json` and lenient about the items: without them a table has figures but no intervals.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pivotune.errors import UsageError
from pivotune.results.metrics import Form, Metric, MetricResult
from pivotune.text.files import finite, write_bytes, write_json

RESULTS = "results.json"
ITEMS = "results.items.jsonl.gz"
_CONDITIONS = ("split", "origin", "prompt_hash", "template", "limit", "revision", "settings", "versions")
# The first releases wrote no metric definitions; training's held-out NLL was their only metric.
_IMPLIED = {"nll": {"form": "ratio", "fields": ["nll", "tokens"], "higher_is_better": False}}

Items = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One task of a run.

    Attributes:
        conditions: settings that the figures depend on (split, origin, limit, ...).
        weights: digest of the evaluated model's files; empty where it is not known (training's own held-out figures).
    """

    name: str
    primary: str
    benchmark: str
    language: str
    metrics: Mapping[str, MetricResult]
    conditions: Mapping[str, Any]
    weights: str = ""


@dataclass(frozen=True, slots=True)
class RunResults:
    """All results of one model.

    Attributes:
        items: task -> item id -> numbers, without texts; tasks with unusable items are missing.
        trained_tokens: tokens of the rows of the whole training; None where they were not counted.
        problems: one line for each reason why items are not used.
    """

    path: Path
    model: str
    method: str | None
    tasks: Mapping[str, TaskResult]
    items: Mapping[str, Items]
    problems: list[str] = field(default_factory=list)
    trained_tokens: int | None = None


def results_paths(target: Path) -> tuple[Path, Path]:
    """Return both files of a run folder, or of a file such as `base.json` (with `base.items.jsonl.gz` beside it)."""
    if target.suffix == ".json" and not target.is_dir():
        return target, target.with_name(f"{target.stem}.items.jsonl.gz")
    return target / RESULTS, target / ITEMS


def read_entries(target: Path) -> dict[str, Any]:
    """Return the tasks in a run folder's results or a results file, as they are written; empty without such a file."""
    path, _ = results_paths(target)
    return _read_json(path)["tasks"] if path.exists() else {}


def read_results(target: Path) -> RunResults:
    """Read the results of a run folder, or a results file; raise UsageError if there is none."""
    path, items_path = results_paths(target)
    content = _read_json(path)
    tasks = {name: _parse_task(f"{path}: task {name}", name, entry) for name, entry in content["tasks"].items()}
    problems: list[str] = []
    items = _read_items(items_path, problems) if tasks else {}
    model, method = content.get("model"), content.get("method")
    trained = content.get("trained")
    tokens = trained.get("tokens") if isinstance(trained, dict) else None
    counted = tokens if isinstance(tokens, int) else None
    return RunResults(path, str(model or ""), None if method is None else str(method), tasks, items, problems, counted)


def check_target(target: Path, model: str) -> None:
    """Raise UsageError for a file that holds results of another model, or is not a results file."""
    path, _ = results_paths(target)
    # In a run folder `model` is the model that training started from, so the trained one differs.
    if path.exists() and (earlier := _read_json(path).get("model")) is not None:
        in_run_folder = path.name == RESULTS and (path.parent / "config.yaml").is_file()
        if not in_run_folder and earlier != model and Path(earlier).resolve() != Path(model).resolve():
            raise UsageError(f"{path}: holds results of {earlier}; these are of {model}; write them elsewhere")


def write_results(
    target: Path,
    model: str,
    method: str | None,
    tasks: Mapping[str, Mapping[str, Any]],
    items: Iterable[Mapping[str, Any]],
) -> dict[str, Any]:
    """Add tasks with their items to the results of a run folder or file; other tasks in it stay.

    Each file is replaced atomically. A run folder keeps the model and method that training wrote. An unreadable items file
    is renamed to end in `.broken`.

    Args:
        items: lines of the items file, each with `task` (one of `tasks`) and `item`.

    Returns:
        The content of `results.json`.

    Raises:
        UsageError: the file cannot be written, or as in `check_target`.
    """
    path, items_path = results_paths(target)
    check_target(target, model)
    earlier = _read_json(path) if path.exists() else {}
    merged = {"model": model, "method": method, **earlier, "tasks": {**earlier.get("tasks", {}), **tasks}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = _kept_lines(items_path, tasks)
        lines += [json.dumps(finite(item), ensure_ascii=False) + "\n" for item in items]
        # Items first: after a crash between the two writes the old figures do not match the items, which readers detect.
        write_bytes(items_path, gzip.compress("".join(lines).encode("utf-8"), 6))
        write_json(path, merged)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error})") from error
    return _read_json(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a `metrics.jsonl`; one that a crash cut short is left out."""
    return parse_metrics(path.read_text(encoding="utf-8"))


def parse_metrics(text: str) -> list[dict[str, Any]]:
    """Return the JSON objects among the lines of a text, with null for numbers that are not finite."""
    lines = []
    for line in text.splitlines():
        with suppress(ValueError):
            lines.append(finite(json.loads(line)))
    return [line for line in lines if isinstance(line, dict)]


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level, with keys joined by points."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}".removeprefix("settings.")
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


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


def _parse_task(where: str, name: str, entry: Any) -> TaskResult:
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
        metrics={metric: _parse_metric(f"{where}: metric {metric}", metric, own) for metric, own in entries.items()},
        conditions=flatten({key: entry[key] for key in _CONDITIONS if key in entry}),
        weights=str(entry.get("model_fingerprint") or ""),
    )


def _parse_metric(where: str, name: str, entry: Any) -> MetricResult:
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: expected an object with value, stderr and n, found {str(entry)[:60]}")
    form, fields, better = entry.get("form", "mean"), entry.get("fields", [name]), entry.get("higher_is_better", True)
    if form not in get_args(Form):
        raise UsageError(f"{where}: form {form!r} is not known; allowed: {', '.join(get_args(Form))}")
    needed = 2 if form == "ratio" else 1
    if not isinstance(fields, list) or [type(key) for key in fields] != [str] * needed:
        raise UsageError(f"{where}: fields {fields!r} are not allowed; {form} takes {needed} name(s)")
    if better not in (True, False, None):
        raise UsageError(f"{where}: higher_is_better {better!r} is not allowed; true, false or null")
    numbers = {key: entry.get(key) for key in ("scale", "value", "stderr", "n")}
    for key, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UsageError(f"{where}: {key} is {str(value)[:40]!r}; a number or null is allowed")
    scale, value, stderr, n = (None if number is None else finite(float(number)) for number in numbers.values())
    return MetricResult(Metric(name, form, tuple(fields), scale or 1.0, better), value, stderr, int(n or 0))


def _read_items(path: Path, problems: list[str]) -> dict[str, Items]:
    """Return the items by task, without a truncated file's items and without tasks that have a faulty item."""
    tasks: dict[str, dict[str, Mapping[str, Any]]] = {}
    faults: dict[str, str] = {}
    number = 0
    try:
        for number, line in _numbered_lines(path):
            record = json.loads(line)
            if not isinstance(record, dict) or "task" not in record or "item" not in record:
                raise ValueError(f"expected an object with task and item, found {line[:40].strip()}")
            task, item = str(record.pop("task")), str(record.pop("item"))
            # Texts would fill the memory.
            numbers = {key: value for key, value in record.items() if isinstance(value, (int, float, list))}
            own = tasks.setdefault(task, {})
            if item in own:
                faults.setdefault(task, f"line {number}: item {item} of {task} appears twice")
            elif bad := [key for key, value in numbers.items() if finite(value) != value]:
                faults.setdefault(task, f"line {number}: {bad[0]} of item {item} of {task} is not a finite number")
            own[item] = numbers
    except FileNotFoundError:
        problems.append(f"{path}: no such file: no intervals")
        return {}
    except (OSError, EOFError, zlib.error, ValueError) as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        problems.append(f"{path}: cannot be read after line {number} ({reason}): no intervals")
        return {}
    problems += [f"{path}, {fault}: no intervals for {task}" for task, fault in faults.items()]
    return {task: own for task, own in tasks.items() if task not in faults}


def _kept_lines(path: Path, tasks: Mapping[str, Any]) -> list[str]:
    """Return the lines of tasks other than these; rename an unreadable file."""
    try:
        lines = [line for _, line in _numbered_lines(path)]
        return [line.rstrip("\n") + "\n" for line in lines if str(json.loads(line)["task"]) not in tasks]
    except FileNotFoundError:
        return []
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError):
        path.replace(path.with_name(f"{path.name}.broken"))
        return []


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
