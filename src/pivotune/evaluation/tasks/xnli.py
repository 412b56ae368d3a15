"""XNLI: does a sentence follow from another? 15 languages, three answers (Conneau et al., 2018).

Prompt and answers are lm-evaluation-harness's `xnli_{language}`: the three whole texts "premise, right? Yes|Also|No,
hypothesis" in the language itself are compared by their likelihood, after an empty question.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from pivotune.evaluation.sources import Source
from pivotune.evaluation.tasks.base import Benchmark, Task, TaskData
from pivotune.evaluation.tasks.harness import ACCURACY, harness_items
from pivotune.evaluation.tasks.tables import Record, Split, index_by_id, open_set, read_table

HOMEPAGE = "https://github.com/facebookresearch/XNLI"
HUB = "facebook/xnli"

_LABELS = {"entailment": 0, "neutral": 1, "contradiction": 2, "contradictory": 2, "0": 0, "1": 1, "2": 2}
_COLUMNS = {
    "premise": ("premise", "sentence1"),
    "hypothesis": ("hypothesis", "sentence2"),
    "label": ("label", "gold_label"),
}


def _splits(language: str) -> list[Split]:
    """XTREME's files (one language each; premise, hypothesis, label) and XNLI-1.0's (all languages in one)."""
    validation = (f"dev-{language}.tsv", "xnli.dev.tsv")
    test = (f"test-{language}.labelled.tsv", f"test-{language}.tsv", "xnli.test.tsv")
    return [Split("validation", validation, ("val", "dev")), Split("test", test)]


def _read(language: str, source: Source) -> TaskData:
    task = f"xnli_{language}"
    read = partial(read_table, columns=_COLUMNS)
    opened = open_set(task, source, _splits(language), HOMEPAGE, read=read, hub=(HUB, language), columns=_COLUMNS)
    docs = index_by_id(task, opened.origin, _docs(opened.records, language))
    return TaskData(harness_items(task, docs), opened.split, opened.origin)


def _docs(records: Iterator[Record], language: str) -> Iterator[tuple[str, Record, dict[str, Any]]]:
    for record in records:
        if record.values.get("language", language) == language:
            doc = {
                "premise": record.text("premise"),
                "hypothesis": record.text("hypothesis"),
                "label": record.label("label", _LABELS),
            }
            yield record.values.get("pairID") or str(record.number), record, doc


def _tasks(language: str) -> list[Task]:
    return [Task(f"xnli_{language}", "xnli", language, "choice", (ACCURACY,), partial(_read, language))]


XNLI = Benchmark(
    name="xnli",
    title="XNLI",
    languages=("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh"),
    tasks=_tasks,
    homepage=HOMEPAGE,
)
