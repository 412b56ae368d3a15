"""TruthfulQA, MC1: is the one true answer likelier than every false one? (Lin et al., 2022; Okapi's translations.)

Zero-shot, as in the paper this project follows: the question is all the model is given. lm-evaluation-harness puts six
English questions with answers in front, in every language, so its figures are others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pivotune.data.formats import file_type
from pivotune.evaluation.sources import Source
from pivotune.evaluation.tasks.base import Benchmark, Item, Task, TaskData
from pivotune.evaluation.tasks.harness import OKAPI_LANGUAGES
from pivotune.evaluation.tasks.question_answering import check_published
from pivotune.evaluation.tasks.tables import Record, Split, index_by_id, open_set, read_objects, read_table
from pivotune.results.metrics import Metric

HOMEPAGE = (
    "https://github.com/sylinrl/TruthfulQA (English) or https://huggingface.co/datasets/alexandrainst/m_truthfulqa"
)

_LANGUAGES = tuple(sorted((*OKAPI_LANGUAGES, "en")))
MC1 = Metric("mc1", "mean", ("correct",), 100.0)

_CSV_COLUMNS = {"question": ("Question",), "best": ("Best Answer",), "incorrect": ("Incorrect Answers",)}
_JSON_COLUMNS = {"question": ("question",)}
_SEPARATORS = (";", "；", "؛")
_FULL_STOPS = {"zh": "。", "ja": "。", "hi": "।", "bn": "।", "mr": "।", "ne": "।"}
_LABELS = (0, 1)


def _split(language: str) -> Split:
    name = "[Tt]ruthful[Qq][Aa]"
    kinds = ("csv", "json", "jsonl")
    patterns = [
        *(f"{name}[_-]{language}/*.{kind}" for kind in kinds),
        *(f"*{name}*/{language}_validation.{kind}" for kind in kinds),
        *(f"{name}*[_.-]{language}.{kind}" for kind in kinds),
        *(f"{name}*[_.-]{language}[_.-]*.{kind}" for kind in kinds),
        *(f"{language}_validation.{kind}" for kind in kinds),
        *(["TruthfulQA.csv", "mc_task.json"] if language == "en" else []),
    ]
    own = "TruthfulQA.csv or mc_task.json" if language == "en" else f"truthfulqa_{language}/TruthfulQA.csv"
    files = f"{own} or TruthfulQA_{language}.csv or {language}_validation.json"
    return Split("validation", patterns, ("val",), None if language == "en" else "val", files)


def _read(language: str, source: Source) -> TaskData:
    task = f"truthfulqa_{language}"
    if source.data_dir is None:
        check_published(task, language, _LANGUAGES)
    opened = open_set(
        task,
        source,
        [_split(language)],
        HOMEPAGE,
        read=_records,
        hub=("truthfulqa/truthful_qa", "multiple_choice")
        if language == "en"
        else ("alexandrainst/m_truthfulqa", language),
        columns=_JSON_COLUMNS,
        keep=partial(_is_of, language),
    )
    rows = ((str(number), record, record) for number, record in enumerate(opened.records, start=1))
    records = index_by_id(task, opened.origin, rows)
    items = [_item(identifier, record, language) for identifier, record in records.items()]
    return TaskData(items, opened.split, opened.origin)


def _is_of(language: str, path: Path) -> bool:
    """`truthfulqa_vi/TruthfulQA.csv` is not the English file."""
    folder = re.fullmatch(r"truthfulqa[_-]([a-z]{2})", path.parent.name.casefold())
    return folder is None or folder[1] == language


def _records(path: Path) -> Iterator[Record]:
    if file_type(path) == ".csv":
        return read_table(path, _CSV_COLUMNS, delimiter=",", header=True)
    return read_objects(path, _JSON_COLUMNS)


def _item(identifier: str, record: Record, language: str) -> Item:
    if "best" in record.values:
        texts, labels = _from_answers(record, _FULL_STOPS.get(language, "."))
    else:
        texts, labels = _from_targets(record)
    choices, gold = _choices(record, texts, labels)
    category = record.values.get("Category")
    details = {"category": category} if category else {}
    return Item(identifier, record.text("question").strip(), choices=choices, gold=gold, details=details)


def _from_answers(record: Record, full_stop: str) -> tuple[list[str], list[int]]:
    """The table's best answer and its incorrect ones; each ends with a full stop, as in the publisher's own script."""
    incorrect = record.text("incorrect")
    separator = next((mark for mark in _SEPARATORS if mark in incorrect), _SEPARATORS[0])
    wrong = [piece for piece in map(str.strip, incorrect.split(separator)) if piece]
    texts = [_closed(text, full_stop) for text in (record.text("best").strip(), *wrong)]
    return texts, [1] + [0] * len(wrong)


def _closed(text: str, full_stop: str) -> str:
    return text if text.endswith((".", "。", "।")) else text + full_stop


def _from_targets(record: Record) -> tuple[Sequence[Any], Sequence[Any]]:
    """`mc1_targets` as {choices, labels} or {text: label}, or the two lists under names of their own."""
    targets = record.values.get("mc1_targets")
    if isinstance(targets, dict) and targets.keys() != {"choices", "labels"}:
        return list(targets), list(targets.values())
    lists = targets if isinstance(targets, dict) else record.values
    prefix = "" if isinstance(targets, dict) else "mc1_targets_"
    choices, labels = (lists.get(f"{prefix}{name}") for name in ("choices", "labels"))
    if not isinstance(choices, list) or not isinstance(labels, list):
        raise record.error("no mc1_targets, nor the lists mc1_targets_choices and mc1_targets_labels")
    return choices, labels


def _choices(record: Record, texts: Sequence[Any], labels: Sequence[Any]) -> tuple[tuple[str, ...], int]:
    """The answers, each once and none empty, and the index of the right one."""
    if len(texts) != len(labels) or not all(isinstance(text, str) for text in texts):
        raise record.error(f"{len(texts)} answers with {len(labels)} labels; allowed: as many texts as labels")
    unknown = [label for label in labels if label not in _LABELS]
    if unknown:
        raise record.error(f"label is {unknown[0]!r:.60}; allowed: 0, 1")
    right = [text for text, label in zip(texts, labels, strict=True) if label == 1]
    if len(right) != 1 or not right[0].strip():
        raise record.error(f"{sum(1 for text in right if text.strip())} right answers; allowed: 1")
    choices = tuple(dict.fromkeys(text for text in texts if text.strip()))
    if len(choices) < 2:
        raise record.error("no wrong answer; at least 1 is needed")
    return choices, choices.index(right[0])


def _tasks(language: str) -> list[Task]:
    return [Task(f"truthfulqa_{language}", "truthfulqa", language, "choice", (MC1,), partial(_read, language))]


TRUTHFULQA = Benchmark(
    name="truthfulqa",
    title="TruthfulQA (MC1)",
    languages=_LANGUAGES,
    tasks=_tasks,
    homepage=HOMEPAGE,
    open_ended=True,
)
