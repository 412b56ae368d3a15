"""Texts of evaluation items, for the comparison with training rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pivotune.evaluation.registry import find_tasks
from pivotune.evaluation.tasks.base import Item
from pivotune.evaluation.tasks.tables import Source


def evaluation_texts(
    names: Iterable[str], languages: Sequence[str], data_dir: Path | None
) -> dict[str, list[list[str]]]:
    """Return the texts of every item of the tasks: question lines, gold answer, sentences.

    Args:
        names, languages: as in `find_tasks`; `data_dir` as in `EvaluationSettings`.

    Raises:
        UsageError: an unknown task, or one without data.
    """
    source = Source(data_dir)
    return {task.name: _item_texts(task.read(source).items) for task in find_tasks(names, languages)}


def _item_texts(items: Sequence) -> list[list[str]]:
    """Return the texts of each item, without the lines and labels (`Question:`) that over half of the items share."""
    texts = [
        [*item.query.splitlines(), item.gold_answer] if isinstance(item, Item) else [item.target, item.english]
        for item in items
    ]
    counts = Counter(part for lines in texts for part in {part for line in lines for part in (line, _label(line))})
    shared = {part for part, count in counts.items() if part and 2 * count > len(items) > 1}
    return [
        [
            line.removeprefix(label) if (label := _label(line)) in shared else line
            for line in lines
            if line not in shared
        ]
        for lines in texts
    ]


def _label(line: str) -> str:
    head, colon, _ = line.partition(":")
    return head + colon if colon else ""
