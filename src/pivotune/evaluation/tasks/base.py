"""Definitions of benchmarks; a task is a benchmark in one language (`xquad_vi`), its items are plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from pivotune.evaluation.tasks.tables import Source
from pivotune.results.metrics import Metric

Kind = Literal["answer", "choice", "translation", "alignment"]

ACCURACY = Metric("accuracy", "mean", ("correct",), 100.0)


@dataclass(frozen=True, slots=True)
class Item:
    """One question with gold answers, or with choices of which one is right.

    Attributes:
        id: unique within the task and equal in every run; paired tests join on it.
        query: the user's text, put into the run's template. May be empty (XNLI scores whole sentences).
        references: gold answers, the likeliest first: its likelihood is reported.
        choices: continuations; the likeliest is the model's answer, and `gold` the index of the right one.
        delimiter: text between query and answer without a template (`--template none`).
        cuttable: span of the query that loses its beginning in a too long prompt (the passage, the sentence to
            translate); None for the whole query.
        details: further data for the scorer and readers of the items (subject, answer types, source sentence).
    """

    id: str
    query: str
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    gold: int | None = None
    delimiter: str = " "
    cuttable: tuple[int, int] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gold_answer(self) -> str:
        return self.references[0] if self.gold is None else self.choices[self.gold]


@dataclass(frozen=True, slots=True)
class TaskData:
    """Items of one task, or sentence pairs of an alignment task.

    Attributes:
        items: `Item`s or `SentencePair`s that count; both have an `id`.
        origin: file names or a Hub name.
        left_out: number of skipped records by reason (MKQA's questions without a short answer).
    """

    items: Sequence[Any]
    split: str
    origin: Sequence[str]
    left_out: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task:
    """One benchmark in one language.

    Attributes:
        name: as after `--tasks` and in results (`xquad_vi`, `flores_en-vi`).
        kind: `answer` and `translation` are generated greedily; `choice` takes the likeliest continuation; `alignment`
            compares hidden states.
        metrics: the first is the primary one.
        read: returns the items; raises `UsageError` with file and row, or with the source of a missing set.
        answer_language: language of right answers; None for answers without one (numbers, names).
        score: numbers of an item from a generated answer (may be empty), for `answer` and `translation`; `metrics`
            refer to their names. Choices are scored by `run.score_item`.
        stop: strings that end generation after the first word.
    """

    name: str
    benchmark: str
    language: str
    kind: Kind
    metrics: Sequence[Metric]
    read: Callable[[Source], TaskData]
    answer_language: str | None = None
    score: Callable[[str, Item], Mapping[str, Any]] | None = None
    max_new_tokens: int = 64
    stop: Sequence[str] = ("\n",)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A set of tasks, by language.

    Attributes:
        languages: codes of the published languages.
        tasks: tasks of one language (translation has two: into and out of it).
        homepage: source of the publisher's files.
        open_ended: True to read files of the same format in other languages too.
    """

    name: str
    title: str
    languages: Sequence[str]
    tasks: Callable[[str], Sequence[Task]]
    homepage: str
    open_ended: bool = False


# (language, source) -> items
Reader = Callable[[str, Source], TaskData]


def choice_benchmark(
    name: str,
    title: str,
    languages: Sequence[str],
    homepage: str,
    read: Reader,
    metric: Metric = ACCURACY,
    open_ended: bool = False,
) -> Benchmark:
    """Return a benchmark with one multiple-choice task per language."""

    def tasks(language: str) -> list[Task]:
        return [Task(f"{name}_{language}", name, language, "choice", (metric,), partial(read, language))]

    return Benchmark(name, title, languages, tasks, homepage, open_ended)
