"""From a model's answers to the numbers of each item, and from those to a task's entry in `results.json`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pivotune.errors import UsageError
from pivotune.evaluation.metrics.answer_language import in_language
from pivotune.evaluation.prompts import Context, Prompter
from pivotune.evaluation.requests import Answer, Generation, Likelihood, LogProbability, Question, Request
from pivotune.evaluation.tasks.base import Item, Task
from pivotune.results.metrics import Metric, summarize

# Beside accuracy, for every task: less noisy than F1 for small models.
GOLD_METRICS = (
    Metric("nll_per_token", "ratio", ("gold_nll", "gold_tokens"), higher_is_better=False),
    Metric("nll_per_character", "ratio", ("gold_nll", "gold_characters"), higher_is_better=False),
)
ANSWER_METRICS = (
    Metric("in_language", "mean", ("in_language",), 100.0),
    Metric("answer_characters", "mean", ("answer_characters",), higher_is_better=None),
    Metric("empty_answers", "mean", ("empty",), 100.0, higher_is_better=False),
)


@dataclass(frozen=True, slots=True)
class ItemRequests:
    """What is asked of the model for one item: its generated answer, and the likelihoods of gold or choices."""

    item: Item
    context: Context
    likelihoods: tuple[Likelihood, ...]
    generation: Generation | None = None

    @property
    def all(self) -> tuple[Question, ...]:
        return self.likelihoods if self.generation is None else (*self.likelihoods, self.generation)


def item_requests(task: Task, item: Item, prompter: Prompter, max_new_tokens: int | None = None) -> ItemRequests:
    """The requests of one item under the run's template.

    Raises:
        UsageError: the model's context has no room for the prompt.
    """
    delimiter = prompter.delimiter(item.delimiter)
    texts = item.choices if task.kind == "choice" else (item.gold_answer,)
    continuations = [f"{delimiter}{text}" for text in texts]
    longest = max(len(prompter.encode_pair("\n", text)[1]) for text in continuations)
    reserve = longest if task.kind == "choice" else max(longest, max_new_tokens or task.max_new_tokens)
    if not item.query and prompter.max_length is not None and reserve >= prompter.max_length:
        # Nothing of the prompt can give way: the continuations themselves are cut on the left, as the harness does.
        context = Context(prompter.context("", 0).text, truncated=True)
    else:
        try:
            context = prompter.context(item.query, reserve, item.cuttable)
        except UsageError as error:
            raise UsageError(f"{task.name}, item {item.id}: {error}") from error
    likelihoods = tuple(Likelihood(context.text, text) for text in continuations)
    if task.kind == "choice":
        return ItemRequests(item, context, likelihoods)
    stop = tuple(task.stop)
    return ItemRequests(
        item, context, likelihoods, Generation(context.text, max_new_tokens or task.max_new_tokens, stop)
    )


def score_item(task: Task, asked: ItemRequests, answer_to: Callable[[Request], Answer]) -> dict[str, Any]:
    """The item's record in `results.items.jsonl.gz`."""
    item = asked.item
    scores = [_logprob(answer_to(request)) for request in asked.likelihoods]
    gold = scores[0] if item.gold is None else scores[item.gold]
    record: dict[str, Any] = {"task": task.name, "item": item.id}
    if asked.generation is None:
        record |= _choice(item, scores)
    else:
        record |= _generated(task, item, str(answer_to(asked.generation)))
    record |= {"gold_nll": -gold.logprob, "gold_tokens": gold.tokens, "gold_characters": len(item.gold_answer)}
    if asked.context.truncated:
        record["truncated"] = True
    return record


def task_metrics(task: Task) -> list[Metric]:
    """All metrics of a task, the primary one first."""
    answers = () if task.kind == "choice" else ANSWER_METRICS
    return [*task.metrics, *GOLD_METRICS, *answers]


def task_entry(metrics: Sequence[Metric], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Value, standard error and count of every metric; the first one also at the top, as the contract has it."""
    figures: dict[str, dict[str, Any]] = {}
    for metric in metrics:
        figure = summarize(metric, records)
        if figure.n:
            figures[metric.name] = {**figure.to_dict(), **metric.to_dict()}
    primary = metrics[0].name
    top = {key: figures[primary][key] for key in ("value", "stderr", "n", "higher_is_better")}
    return {"metric": primary, **top, "metrics": figures}


def prompt_hash(requests: Sequence[ItemRequests]) -> str:
    """The same when, and only when, the model was asked the same things in the same words."""
    content = [[asked.item.id, asked.context.text, [r.continuation for r in asked.likelihoods]] for asked in requests]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()[:16]


def _choice(item: Item, scores: Sequence[LogProbability]) -> dict[str, Any]:
    # A NaN from a broken model is never the likeliest.
    values = [-math.inf if math.isnan(score.logprob) else score.logprob for score in scores]
    chosen = max(range(len(values)), key=values.__getitem__)
    return {"choice": chosen, "correct": int(chosen == item.gold), **_plain(item.details)}


def _generated(task: Task, item: Item, text: str) -> dict[str, Any]:
    text = text.strip()
    assert task.score is not None
    fits = in_language(text, task.answer_language) if task.answer_language and text else None
    return {
        **task.score(text, item),
        "answer": text,
        "answer_characters": len(text),
        "empty": int(not text),
        "in_language": None if fits is None else int(fits),
    }


def _plain(details: Mapping[str, Any]) -> dict[str, Any]:
    """Short facts only (a subject): the question itself is in the data set."""
    return {key: value for key, value in details.items() if isinstance(value, (str, int)) and len(str(value)) <= 64}


def _logprob(answer: Answer) -> LogProbability:
    assert isinstance(answer, LogProbability)
    return answer
