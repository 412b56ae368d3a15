"""What a benchmark is: a name, its languages, a reader that gives items, and how a model's answers to them are scored.

A task is a benchmark in one language (`xquad_vi`). Its items are plain data, the same whether they were read from the
publisher's own files or from the Hub; the runner turns them into requests, and `Metric`s say how the per-item numbers in
`results.items.jsonl.gz` make the figures in `results.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pivotune.evaluation.sources import Source
from pivotune.results.metrics import Metric

Kind = Literal["answer", "choice", "translation"]


@dataclass(frozen=True, slots=True)
class Item:
    """One question: the user's text, and either gold answers or choices with the right one.

    Attributes:
        id: unique within the task and the same in every run; paired tests join on it.
        query: what the user says; the run's template goes around it. May be empty (XNLI scores whole sentences).
        references: gold answers, the likeliest to be given first: its likelihood is reported.
        choices: continuations of which the likeliest is taken as the model's answer.
        gold: index of the right choice.
        delimiter: what stands between query and answer where no template does (`--template none`).
        cuttable: characters of the query whose beginning may be left out where the model's context is too short (the
            passage, the sentence to translate); None for all of it.
        details: more that the scorer or a reader of the items needs (subject, answer types, source sentence).
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
    """What was read for one task.

    Attributes:
        items: the questions that count.
        split: the split they are.
        origin: where they come from: file names or a Hub name.
        left_out: how many records of the split are no items, by reason (MKQA's questions that have no short answer).
    """

    items: Sequence[Item]
    split: str
    origin: Sequence[str]
    left_out: Mapping[str, int] = field(default_factory=dict)


Score = Callable[[str, Item], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Task:
    """One benchmark in one language.

    Attributes:
        name: as typed after `--tasks` and as written in results (`xquad_vi`, `flores_en-vi`).
        benchmark: the set's name (`xquad`).
        language: two-letter code of the language that is measured, as in `data.language`.
        kind: `answer` and `translation` are generated greedily, `choice` is the likeliest continuation.
        metrics: the first is the primary one.
        read: gives the items; raises `UsageError` with one line (which file, row; where to get a missing set).
        answer_language: language that answers should be in; None where answers have no language (numbers, names).
        score: for `answer` and `translation`: the item's numbers, from the generated text (may be empty) and the item; the
            names that `metrics` refer to. Choice tasks are scored by the runner (`accuracy`).
        max_new_tokens: longest answer that is generated.
        stop: strings at which generation ends, once something other than white space has been said.
    """

    name: str
    benchmark: str
    language: str
    kind: Kind
    metrics: Sequence[Metric]
    read: Callable[[Source], TaskData]
    answer_language: str | None = None
    score: Score | None = None
    max_new_tokens: int = 64
    stop: Sequence[str] = ("\n",)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A set of tasks, one per language.

    Attributes:
        name: prefix of its tasks' names.
        title: for tables and messages.
        languages: two-letter codes it is published in; other languages are read where files of its format are at hand
            (`open_ended`).
        tasks: the tasks of one language (translation has two: into and out of it).
        homepage: where the publisher's files are.
    """

    name: str
    title: str
    languages: Sequence[str]
    tasks: Callable[[str], Sequence[Task]]
    homepage: str
    open_ended: bool = False
