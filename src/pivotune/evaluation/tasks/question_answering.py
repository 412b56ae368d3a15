"""What XQuAD, MLQA and MKQA share: scoring of answers, and the checks of the records they are read from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from pivotune.errors import UsageError
from pivotune.evaluation.metrics.answers import QUESTION_ANSWERING_METRICS, RuleName, exact_match, f1_score
from pivotune.evaluation.sources import Source
from pivotune.evaluation.tasks.base import Item, Task, TaskData

# An item and where it was read, for messages.
PlacedItem = tuple[str, Item]

_MAX_NEW_TOKENS = 64
_KEYS_SHOWN = 8
_WANTED = {str: "text", list: "a list", dict: "an object"}


def answer_task(benchmark: str, language: str, rules: RuleName, read: Callable[[Source], TaskData]) -> Task:
    """A task whose answers are generated greedily and scored by token F1 and exact match."""
    return Task(
        name=f"{benchmark}_{language}",
        benchmark=benchmark,
        language=language,
        kind="answer",
        metrics=QUESTION_ANSWERING_METRICS,
        read=read,
        # Language identification knows no regions: answers to zh_hk should be zh.
        answer_language=language.partition("_")[0],
        score=partial(_score, language, rules),
        max_new_tokens=_MAX_NEW_TOKENS,
    )


def _score(language: str, rules: RuleName, answer: str, item: Item) -> dict[str, float]:
    return {
        "f1": f1_score(answer, item.references, language, rules),
        "exact_match": exact_match(answer, item.references, language, rules),
    }


def check_published(task: str, language: str, languages: Sequence[str]) -> None:
    """Raises UsageError where the Hub cannot have a language, before anything is loaded."""
    if language not in languages:
        raise UsageError(
            f"{task}: the Hub has this set in {', '.join(languages)}; another language needs its file and --data-dir"
        )


def distinct_items(task: str, origin: Sequence[str], placed: Iterable[PlacedItem]) -> list[Item]:
    """The items in their order; paired tests join on their ids, so each must have its own.

    Raises:
        UsageError: an id stands twice (both places are named), or there are no items at all.
    """
    items: list[Item] = []
    places: dict[str, str] = {}
    for place, item in placed:
        if item.id in places:
            raise UsageError(f"{place}: the id {item.id!r} is that of {places[item.id]} too; ids must be distinct")
        places[item.id] = place
        items.append(item)
    if not items:
        raise UsageError(f"{task}: no questions that can be asked in {', '.join(origin)}")
    return items


def member(record: Any, key: str, kind: type[str] | type[list] | type[dict], place: str) -> Any:
    """`record[key]`, which must be there and of that kind.

    Raises:
        UsageError: one line with the place, what was found and what is needed.
    """
    if not isinstance(record, Mapping):
        raise UsageError(f"{place}: found {_describe(record)}, where an object with {key!r} is needed")
    if key not in record:
        keys = ", ".join(repr(name) for name in list(record)[:_KEYS_SHOWN]) or "nothing"
        raise UsageError(f"{place}: no {key!r}; found {keys}")
    if not isinstance(record[key], kind):
        raise UsageError(f"{place}: {key!r} is {_describe(record[key])}; {_WANTED[kind]} is needed")
    return record[key]


def text_member(record: Any, key: str, place: str, *, may_be_blank: bool = False) -> str:
    """`record[key]` as a text that a tokenizer can read, and that is not blank unless it may be.

    Raises:
        UsageError: as `member`.
    """
    text = member(record, key, str, place)
    if not may_be_blank and not text.strip():
        raise UsageError(f"{place}: {key!r} is empty; text is needed")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{place}: {key!r} holds half of a surrogate pair, which is no character") from None
    return text


def id_member(record: Any, key: str, place: str) -> str:
    """`record[key]` as an id: a text, or a whole number, as text.

    Raises:
        UsageError: as `member`.
    """
    value = record.get(key) if isinstance(record, Mapping) else None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_member(record, key, place)


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    for kind, name in ((bool, "a truth value"), ((int, float), "a number"), *_WANTED.items()):
        if isinstance(value, kind):
            return name
    return type(value).__name__
