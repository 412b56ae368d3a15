"""MKQA: open-domain questions in 26 languages, answered without a passage (Longpre et al., TACL 2021).

The publisher's file `mkqa.jsonl.gz` has one question a line, with its translations and its gold answers per language, each
with a type, a text and aliases. Answers are scored as the official script does: by its normalisation, and the best over all
texts and aliases counts. Where this differs from the official figures:

- Questions that have no short answer (types `unanswerable` and `long_answer`, a third of the set) are left out and counted.
  The official gold for them is an empty answer, chosen by a threshold on a probability of "no answer" that a model which
  just answers does not have; with it, a model that never answers scores 32.
- The gold answer of a yes-no question is "yes" or "no" in every language, for the official prediction file has a field of
  its own for it. A generated answer is text, so the language's own words are gold answers too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pivotune.data.formats import numbered_by, read_file
from pivotune.errors import UsageError
from pivotune.evaluation.sources import Source, hub_name, read_hub_records
from pivotune.evaluation.tasks.base import Benchmark, Item, Task, TaskData
from pivotune.evaluation.tasks.question_answering import (
    PlacedItem,
    answer_task,
    check_published,
    distinct_items,
    id_member,
    member,
    text_member,
)
from pivotune.evaluation.tasks.tables import Split, choose_split, only_file, origin_of

_HOMEPAGE = "https://github.com/apple/ml-mkqa"
_HUB = ("apple/mkqa", "mkqa")
# The Hub's name for the only split, though nobody trains on it; the publisher's repository has a second, tiny file.
_SPLIT = Split("train", ["mkqa.jsonl", "*mkqa*.jsonl"])
_LANGUAGES = (
    "ar", "da", "de", "en", "es", "fi", "fr", "he", "hu", "it", "ja", "km", "ko", "ms", "nl", "no", "pl", "pt", "ru", "sv",
    "th", "tr", "vi", "zh", "zh_hk", "zh_tw",
)  # fmt: skip

# A record with its number and its place, for messages.
_PlacedRecord = tuple[int, str, Any]

# In the order of the Hub's class labels.
_TYPES = (
    "entity", "long_answer", "unanswerable", "date", "number", "number_with_unit", "short_phrase", "binary",
)  # fmt: skip
_NO_ANSWER_TYPES = ("unanswerable", "long_answer")

# Yes and no, the commonest word first.
_YES_NO = {
    "ar": ("نعم", "لا"),
    "da": ("ja", "nej"),
    "de": ("ja", "nein"),
    "en": ("yes", "no"),
    "es": ("sí si", "no"),
    "fi": ("kyllä joo", "ei"),
    "fr": ("oui", "non"),
    "he": ("כן", "לא"),
    "hu": ("igen", "nem"),
    "it": ("sì si", "no"),
    "ja": ("はい", "いいえ"),
    "km": ("បាទ ចាស", "ទេ"),
    "ko": ("네 예", "아니요 아니오"),
    "ms": ("ya", "tidak"),
    "nl": ("ja", "nee"),
    "no": ("ja", "nei"),
    "pl": ("tak", "nie"),
    "pt": ("sim", "não"),
    "ru": ("да", "нет"),
    "sv": ("ja", "nej"),
    "th": ("ใช่", "ไม่ใช่ ไม่"),
    "tr": ("evet", "hayır"),
    "vi": ("có đúng phải vâng", "không"),
    "zh": ("是 是的 对", "不是 不 否"),
    "zh_hk": ("是 係 是的 對", "不是 唔係 不 否"),
    "zh_tw": ("是 是的 對", "不是 不 否"),
}


def _tasks(language: str) -> list[Task]:
    return [answer_task("mkqa", language, "mkqa", partial(_read, language))]


def _read(language: str, source: Source) -> TaskData:
    task = f"mkqa_{language}"
    split, files = choose_split(task, source, [_SPLIT], _HOMEPAGE)
    if files:
        records, origin = _file_records(only_file(task, files)), origin_of(source, files)
    else:
        check_published(task, language, _LANGUAGES)
        records, origin = _hub_records(task, split.hub_name), [hub_name(*_HUB)]
    left_out: Counter[str] = Counter()
    items = distinct_items(task, origin, _asked(records, language, left_out))
    return TaskData(items, split.name, origin, dict(left_out))


def _file_records(path: Path) -> Iterator[_PlacedRecord]:
    for number, record in read_file(path):
        yield number, f"{path}, {numbered_by(path)} {number}", record


def _hub_records(task: str, split: str) -> Iterator[_PlacedRecord]:
    for number, record in read_hub_records(task, *_HUB, split):
        yield number, f"{hub_name(*_HUB)}, row {number}", record


def _asked(records: Iterator[_PlacedRecord], language: str, left_out: Counter[str]) -> Iterator[PlacedItem]:
    """The questions that have a short answer; the others are counted in `left_out`."""
    for number, place, record in records:
        item = _item(record, number, place, language)
        if item.references:
            yield place, item
        else:
            left_out[_reason(item.details["types"])] += 1


def _item(record: Any, number: int, place: str, language: str) -> Item:
    """The question of a record; without references where none of its answers is short."""
    key = "zh_cn" if language == "zh" else language
    item_id = id_member(record, "example_id", place) if "example_id" in record else str(number)
    query = text_member(member(record, "queries", dict, place), key, f"{place}, 'queries'")
    answers = member(member(record, "answers", dict, place), key, list, f"{place}, 'answers'")
    if not answers:
        raise UsageError(f"{place}, 'answers': {key!r} is empty; at least one answer is needed")
    types: list[str] = []
    golds: list[str] = []
    for index, answer in enumerate(answers, start=1):
        where = f"{place}, answer {index} in {key!r}"
        types.append(_type(answer, where))
        golds += _golds(answer, types[-1], where, language)
    return Item(item_id, query, _ordered(golds), details={"types": list(dict.fromkeys(types))})


def _type(answer: Any, place: str) -> str:
    value = answer.get("type") if isinstance(answer, dict) else None
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(_TYPES):
        return _TYPES[value]
    name = member(answer, "type", str, place)
    if name not in _TYPES:
        raise UsageError(f"{place}: unknown type {name!r}; allowed: {', '.join(_TYPES)}")
    return name


def _golds(answer: dict[str, Any], answer_type: str, place: str, language: str) -> list[str]:
    """Text, then aliases; for yes and no the language's words first. A text that is null is the official empty answer."""
    text = "" if answer.get("text", "") is None else text_member(answer, "text", place, may_be_blank=True).strip()
    aliases = [] if answer.get("aliases") is None else member(answer, "aliases", list, place)
    named = {f"alias {number}": alias for number, alias in enumerate(aliases, start=1)}
    texts = [text, *(text_member(named, name, place, may_be_blank=True).strip() for name in named)]
    return [*_own_words(text, language), *texts] if answer_type == "binary" else texts


def _own_words(text: str, language: str) -> Sequence[str]:
    yes, no = _YES_NO.get(language, ("", ""))
    return {"yes": yes, "no": no}.get(text.lower(), "").split()


def _ordered(golds: Sequence[str]) -> tuple[str, ...]:
    """Each once, the empty answer last: the first is the one whose likelihood is reported. Nothing if all are empty."""
    answers = tuple(dict.fromkeys(gold for gold in golds if gold))
    return (*answers, "") if answers and "" in golds else answers


def _reason(types: Sequence[str]) -> str:
    """Why a question is left out: its type where that says it."""
    named = [name for name in types if name in _NO_ANSWER_TYPES]
    return named[0] if named else "no answer text"


MKQA = Benchmark(
    name="mkqa",
    title="MKQA",
    languages=_LANGUAGES,
    tasks=_tasks,
    homepage=_HOMEPAGE,
)
