"""Where runs were measured under other conditions: a line each, so that a table does not hide it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pivotune.compare.seed_groups import Row

# Where one of these differs, the prompts differ because of it.
_EXPLAINS_PROMPTS = frozenset(("split", "origin", "limit", "seed", "template"))
_PROMPTS = "prompt_hash"
_WORDS = {_PROMPTS: "the prompts"}
_MOST_TASKS = 4
_LONGEST = 60


def condition_warnings(rows: Sequence[Row], tasks: Sequence[str]) -> list[str]:
    """One line for each condition (limit, split, template, ...) that differs between rows, with its values and tasks."""
    found: dict[str, list[str]] = {}
    for task in tasks:
        for line in _task_lines(rows, task):
            found.setdefault(line, []).append(task)
    return with_tasks(found)


def with_tasks(found: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines with the tasks that they are about: one line for fifty tasks of which the same is to be said."""
    return [f"{line} ({_some(list(dict.fromkeys(tasks)))})" for line, tasks in found.items()]


def _task_lines(rows: Sequence[Row], task: str) -> list[str]:
    """What differs between the rows that have the task."""
    conditions = [
        (row.label, run.results.tasks[task].conditions) for row in rows for run in row.runs if task in run.results.tasks
    ]
    keys = dict.fromkeys(key for _, own in conditions for key in own)
    differing = [key for key in keys if len({_text(own.get(key)) for _, own in conditions if key in own}) > 1]
    if _EXPLAINS_PROMPTS.intersection(differing):
        differing = [key for key in differing if key != _PROMPTS]
    return [_line(key, conditions) for key in differing]


def _line(key: str, conditions: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Rows by value, so that ten rows that agree take no more room than one."""
    by_value: dict[str, list[str]] = {}
    for label, own in conditions:
        if key in own:
            labels = by_value.setdefault(_text(own[key]), [])
            labels += [] if label in labels else [label]
    values = "; ".join(f"{_cut(value)} in {_some(labels)}" for value, labels in by_value.items())
    return f"{_WORDS.get(key, key)} differ{'' if key == _PROMPTS else 's'} between runs: {values}"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_TASKS
    return ", ".join(names[:_MOST_TASKS]) + (f" and {more} more" if more > 0 else "")
