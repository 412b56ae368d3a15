"""TruthfulQA, MC1: is the one true answer likelier than every false one? (Lin et al., 2022; Okapi's translations.)

Zero-shot, as in the paper this project follows: the prompt is the question alone. lm-evaluation-harness puts six
English questions with answers in front, in every language, so its figures differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pivotune.data.formats import file_type
from pivotune.evaluation.tasks import tables
from pivotune.evaluation.tasks.base import Item, TaskData, choice_benchmark
from pivotune.evaluation.tasks.harness import OKAPI_LANGUAGES
from pivotune.evaluation.tasks.tables import Record, Source, Split
from pivotune.results.metrics import Metric

_HOMEPAGE = (
    "https://github.com/sylinrl/TruthfulQA (English) or https://huggingface.co/datasets/alexandrainst/m_truthfulqa"
)
_LANGUAGES = tuple(sorted((*OKAPI_LANGUAGES, "en")))
_CSV_COLUMNS = {"question": ("Question",), "best": ("Best Answer",), "incorrect": ("Incorrect Answers",)}
_JSON_COLUMNS = {"question": ("question",)}
_SEPARATORS = (";", "；", "؛")
_FULL_STOPS = {"zh": "。", "ja": "。", "hi": "।", "bn": "।", "mr": "।", "ne": "।"}


def _read(language: str, source: Source) -> TaskData:
    task, is_english = f"truthfulqa_{language}", language == "en"
    tables.check_published(task, source, language, _LANGUAGES)
    name, kinds = "[Tt]ruthful[Qq][Aa]", ("csv", "json", "jsonl")
    patterns = [
        *(f"{name}[_-]{language}/*.{kind}" for kind in kinds),
        *(f"*{name}*/{language}_validation.{kind}" for kind in kinds),
        *(f"{name}*[_.-]{language}.{kind}" for kind in kinds),
        *(f"{name}*[_.-]{language}[_.-]*.{kind}" for kind in kinds),
        *(f"{language}_validation.{kind}" for kind in kinds),
        *(["TruthfulQA.csv", "mc_task.json"] if is_english else []),
    ]
    own = "TruthfulQA.csv or mc_task.json" if is_english else f"truthfulqa_{language}/TruthfulQA.csv"
    files = f"{own} or TruthfulQA_{language}.csv or {language}_validation.json"

    def keep(path: Path) -> bool:
        """Refuse another language's file: `truthfulqa_vi/TruthfulQA.csv` is not the English one."""
        folder = re.fullmatch(r"truthfulqa[_-]([a-z]{2})", path.parent.name.casefold())
        return folder is None or folder[1] == language

    splits = [Split("validation", patterns, ("val",), None if is_english else "val", files)]
    hub = ("truthfulqa/truthful_qa", "multiple_choice") if is_english else ("alexandrainst/m_truthfulqa", language)
    opened = tables.open_set(
        task, source, splits, _HOMEPAGE, read=_file_records, hub=hub, columns=_JSON_COLUMNS, keep=keep
    )
    numbered = ((str(number), record.place, record) for number, record in enumerate(opened.records, start=1))
    records = tables.by_id(task, opened.origin, numbered)
    items = [_item(record, identifier, language) for identifier, record in records.items()]
    return TaskData(items, opened.split, opened.origin)


def _file_records(path: Path) -> Iterator[Record]:
    if file_type(path) == ".csv":
        return tables.read_table(path, _CSV_COLUMNS, delimiter=",", header=True)
    return tables.read_objects(path, _JSON_COLUMNS)


def _item(record: Record, identifier: str, language: str) -> Item:
    texts, labels = _table_answers(record, language) if "best" in record.values else _json_answers(record)
    if len(texts) != len(labels) or not all(isinstance(text, str) for text in texts):
        raise record.error(f"{len(texts)} answers with {len(labels)} labels; allowed: as many texts as labels")
    if unknown := [label for label in labels if label not in (0, 1)]:
        raise record.error(f"label is {unknown[0]!r:.60}; allowed: 0, 1")
    right = [text for text, label in zip(texts, labels, strict=True) if label == 1]
    if len(right) != 1 or not right[0].strip():
        raise record.error(f"{sum(1 for text in right if text.strip())} right answers; allowed: 1")
    choices = tuple(dict.fromkeys(text for text in texts if text.strip()))
    if len(choices) < 2:
        raise record.error("no wrong answer; at least 1 is needed")
    details = {"category": category} if (category := record.values.get("Category")) else {}
    question = record.text("question").strip()
    return Item(identifier, question, choices=choices, gold=choices.index(right[0]), details=details)


def _table_answers(record: Record, language: str) -> tuple[list[str], list[int]]:
    """Return the best answer and the incorrect ones; each ends with a full stop, as in the publisher's own script."""
    incorrect = record.text("incorrect")
    separator = next((mark for mark in _SEPARATORS if mark in incorrect), _SEPARATORS[0])
    wrong = [piece for piece in map(str.strip, incorrect.split(separator)) if piece]
    full_stop, texts = _FULL_STOPS.get(language, "."), (record.text("best").strip(), *wrong)
    closed = [text if text.endswith((".", "。", "।")) else text + full_stop for text in texts]
    return closed, [1] + [0] * len(wrong)


def _json_answers(record: Record) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return texts and labels of `mc1_targets`: {choices, labels}, {text: label}, or two lists of the record itself."""
    targets = record.values.get("mc1_targets")
    if isinstance(targets, dict) and targets.keys() != {"choices", "labels"}:
        return list(targets), list(targets.values())
    lists = targets if isinstance(targets, dict) else record.values
    prefix = "" if isinstance(targets, dict) else "mc1_targets_"
    choices, labels = (lists.get(f"{prefix}{name}") for name in ("choices", "labels"))
    if not isinstance(choices, list) or not isinstance(labels, list):
        raise record.error("no mc1_targets, nor the lists mc1_targets_choices and mc1_targets_labels")
    return choices, labels


_MC1 = Metric("mc1", "mean", ("correct",), 100.0)
TRUTHFULQA = choice_benchmark("truthfulqa", "TruthfulQA (MC1)", _LANGUAGES, _HOMEPAGE, _read, _MC1, open_ended=True)
