"""XCOPA: which of two sentences is the cause or the effect of a third? 11 languages (Ponti et al., 2020), and English COPA.

Prompt and answers are lm-evaluation-harness's `xcopa_{language}`, in English its `copa`: the premise without its full stop,
a connective of the language (because, therefore), and the two sentences in lower case.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pivotune.evaluation.sources import Source
from pivotune.evaluation.tasks.base import Benchmark, Task, TaskData
from pivotune.evaluation.tasks.harness import ACCURACY, harness_items
from pivotune.evaluation.tasks.tables import Record, Split, index_by_id, open_set, read_objects

HOMEPAGE = "https://github.com/cambridgeltl/xcopa"
COPA_HOMEPAGE = "https://super.gluebenchmark.com/tasks"

_COLUMNS = {name: (name,) for name in ("premise", "choice1", "choice2", "question", "label")}
_QUESTIONS = {"cause": "cause", "effect": "effect"}
_LABELS = {"0": 0, "1": 1}


def _splits(language: str) -> list[Split]:
    """Test first, as it is reported; English COPA's test set is without answers, so its validation set comes first."""
    test, validation = (f"{part}.{language}.jsonl" for part in ("test", "val"))
    copa = ["COPA/val.jsonl"] if language == "en" else []
    splits = [
        Split("test", [f"data/{language}/{test}", test], files=test),
        Split(
            "validation",
            [*copa, f"data/{language}/{validation}", validation],
            ("val", "dev"),
            files=" or ".join([*copa, validation]),
        ),
    ]
    return splits[::-1] if language == "en" else splits


def _is_original(path: Path) -> bool:
    """`data-gmt` holds the same file names with the texts translated into English."""
    return "data-gmt" not in path.parts


def _read(language: str, source: Source) -> TaskData:
    task = f"xcopa_{language}"
    is_english = language == "en"
    opened = open_set(
        task,
        source,
        _splits(language),
        COPA_HOMEPAGE if is_english else HOMEPAGE,
        read=partial(read_objects, columns=_COLUMNS),
        hub=("aps/super_glue", "copa") if is_english else ("cambridgeltl/xcopa", language),
        columns=_COLUMNS,
        keep=_is_original,
    )
    docs = index_by_id(task, opened.origin, map(_doc, opened.records))
    return TaskData(harness_items("copa" if is_english else task, docs), opened.split, opened.origin)


def _doc(record: Record) -> tuple[str, Record, dict[str, Any]]:
    doc = {name: record.text(name) for name in ("premise", "choice1", "choice2")}
    labels = {"question": record.label("question", _QUESTIONS), "label": record.label("label", _LABELS)}
    return str(record.values.get("idx", record.number)), record, {**doc, **labels}


def _tasks(language: str) -> list[Task]:
    return [Task(f"xcopa_{language}", "xcopa", language, "choice", (ACCURACY,), partial(_read, language))]


XCOPA = Benchmark(
    name="xcopa",
    title="XCOPA",
    languages=("en", "et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh"),
    tasks=_tasks,
    homepage=HOMEPAGE,
)
