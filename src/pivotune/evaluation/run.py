"""Evaluate one model on any tasks, as `pivotune evaluate` does, and write the results of each finished task."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from pivotune.data.templates import end_of_answer
from pivotune.evaluation.cache import (
    Answer,
    AnswerCache,
    LogProbability,
    Measurement,
    Question,
    Request,
    installed_versions,
    model_fingerprint,
)
from pivotune.evaluation.engine import Engine, transformers_engine, vllm_engine
from pivotune.evaluation.metrics.alignment import measure_alignment
from pivotune.evaluation.metrics.answers import in_language
from pivotune.evaluation.metrics.comet import CometUnavailableError, comet_scores
from pivotune.evaluation.prepare import (
    NO_PIVOT,
    EvaluationSettings,
    PreparedEvaluation,
    PreparedTask,
    prepare_evaluation,
)
from pivotune.evaluation.prompts import ItemRequests
from pivotune.evaluation.tasks.base import Task
from pivotune.models.adapters import merge_adapters
from pivotune.models.loading import load_model
from pivotune.models.locating import resolve_model
from pivotune.results.files import check_target, write_results
from pivotune.results.metrics import Metric, summarize
from pivotune.training.heldout import end_token_ids
from pivotune.training.progress import Progress, silent

# Beside accuracy, for every task: less noisy than F1 for small models.
GOLD_METRICS = (
    Metric("nll_per_token", "ratio", ("gold_nll", "gold_tokens"), higher_is_better=False),
    Metric("nll_per_character", "ratio", ("gold_nll", "gold_characters"), higher_is_better=False),
)
# The choice with the highest log-likelihood per character; the highest sum favours short choices.
CHOICE_METRICS = (Metric("acc_norm", "mean", ("correct_norm",), 100.0),)
ANSWER_METRICS = (
    Metric("in_language", "mean", ("in_language",), 100.0),
    Metric("answer_characters", "mean", ("answer_characters",), higher_is_better=None),
    Metric("empty_answers", "mean", ("empty",), 100.0, higher_is_better=False),
)
# Answers of two parts whose English part ended without the marker.
PIVOT_METRICS = (Metric("no_marker", "mean", ("no_marker",), 100.0, higher_is_better=False),)
COMET = Metric("comet", "mean", ("comet",), 100.0)
_WRITTEN_SETTINGS = ("limit", "seed", "split", "max_new_tokens", "backend", "dtype")
_DETAIL_CHARACTERS = 64  # longest detail of a choice in the items file (a subject, not the question itself)
# Of a query's end, where the question stands; a passage before it is the same for many items.
_QUESTION_CHARACTERS = 400


def evaluate_model(
    model: str | Path,
    tasks: Sequence[str],
    *,
    out: Path | str | None = None,
    languages: Sequence[str] = (),
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Evaluate a model by name: `evaluate_model("runs/vi", ["xquad_vi"], data_dir=Path("eval"), limit=100)`.

    Args:
        model, tasks, languages: as in `prepare_evaluation`.
        out: folder or file for `results.json` and its items; None writes nothing.
        settings: fields of `EvaluationSettings`.

    Returns:
        The content of `results.json`.
    """
    prepared = prepare_evaluation(model, tasks, EvaluationSettings(**settings), languages)
    return execute_evaluation(prepared, None if out is None else Path(out), progress=progress)


def execute_evaluation(
    prepared: PreparedEvaluation,
    out: Path | None,
    *,
    progress: Progress | None = None,
    on_task: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Answer, score and write every task; call `on_task` with its name and entry; return as `evaluate_model`."""
    if out is not None:
        check_target(out, prepared.model)
    evaluator = Evaluator(prepared, progress or silent)
    run: dict[str, Any] = {"model": prepared.model, "method": prepared.method}
    results: dict[str, Any] = {**run, "tasks": {}}
    for task in prepared.tasks:
        entry, records = evaluator.evaluate(task)
        if out is None:
            results["tasks"][task.task.name] = entry
        else:
            results = write_results(out, **run, tasks={task.task.name: entry}, items=records)
        if on_task:
            on_task(task.task.name, entry)
    return results


class Evaluator:
    """Evaluate tasks with one model; its weights are loaded for the first answer that is not in the cache."""

    def __init__(self, prepared: PreparedEvaluation, progress: Progress) -> None:
        self._prepared, self._progress = prepared, progress
        settings, prompter = prepared.settings, prepared.prompter
        self._fingerprint = model_fingerprint(prepared.model, settings.revision)
        self._versions = installed_versions()
        self._loading = {name: getattr(settings, name) for name in ("dtype", "trust_remote_code", "revision")}
        identity = {
            "model": self._fingerprint,
            "dtype": settings.dtype,
            "backend": settings.backend,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "max_length": prompter.max_length,
            "begin": prompter.begin_ids,
            "template": prompter.name,
            "versions": {name: self._versions.get(name) for name in ("torch", "transformers", "lm_eval", "vllm")},
        }
        self._cache = AnswerCache(settings.cache, identity)

    def evaluate(self, task: PreparedTask) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return a task's entry in `results.json` and the records of its items."""
        definition, settings = task.task, self._prepared.settings
        if definition.kind == "alignment":
            metrics = list(definition.metrics)
            records, more = self._measure_alignment(task)
        else:
            records = self._answer_items(definition, task.requests)
            by_kind = CHOICE_METRICS if definition.kind == "choice" else ANSWER_METRICS
            metrics = [*definition.metrics, *GOLD_METRICS, *by_kind, *PIVOT_METRICS]
            prompts = [[a.item.id, a.context.text, [r.continuation for r in a.likelihoods]] for a in task.requests]
            more: dict[str, Any] = {"prompt_hash": _digest(prompts)[:16]}
            if definition.kind == "translation":
                sources = [str(asked.item.details["source"]) for asked in task.requests]
                references = [asked.item.gold_answer for asked in task.requests]
                answers = [record["answer"] for record in records]
                try:
                    scores = comet_scores(sources, answers, references, checkpoint=settings.comet)
                    for record, score in zip(records, scores, strict=True):
                        record["comet"] = score
                    metrics.insert(len(definition.metrics), COMET)
                except CometUnavailableError as error:
                    more["comet"] = f"left out: {error}"
        pivot = self._prepared.pivot if task.marker else NO_PIVOT
        written = {name: getattr(settings, name) for name in _WRITTEN_SETTINGS}
        written |= {"template": self._prepared.prompter.name, "pivot": pivot}
        entry = {
            **_figures(metrics, records),
            # The origin of the figures, for readers and for `compare`, which warns about differences.
            "benchmark": definition.benchmark,
            "language": definition.language,
            "split": task.split,
            "origin": list(task.origin),
            "left_out": dict(task.left_out),
            "truncated": task.truncated,
            "model_fingerprint": self._fingerprint,
            "versions": self._versions,
            "settings": written,
            **more,
        }
        return entry, records

    @cached_property
    def model(self) -> Any:
        """Load the weights, with merged adapters, onto the GPU if there is one."""
        model: Any = merge_adapters(load_model(self._prepared.model, **self._loading))
        return model.to("cuda") if torch.cuda.is_available() else model

    @cached_property
    def engine(self) -> Engine:
        prompter, size = self._prepared.prompter, self._prepared.settings.batch_size
        if self._prepared.settings.backend == "vllm":
            ends = [] if prompter.template is None else [end_of_answer(prompter.template, prompter.tokenizer)]
            name = resolve_model(self._prepared.model)
            return vllm_engine(name, prompter, batch_size=size, end_token_ids=ends, **self._loading)
        ends = end_token_ids(self.model, prompter.tokenizer, prompter.template)
        return transformers_engine(self.model, prompter, batch_size=size, end_token_ids=ends)

    def _answer_items(self, task: Task, items: Sequence[ItemRequests]) -> list[dict[str, Any]]:
        """Answer all requests and score all items; English parts first, because the other requests stand behind them."""
        self._answer(f"{task.name}, English part", [asked.pivot for asked in items if asked.pivot is not None])
        as_text, get = self._prepared.prompter.as_text, self._cache.get
        items = [asked.behind(as_text(str(get(asked.pivot)))) if asked.pivot else asked for asked in items]
        self._answer(task.name, [request for asked in items for request in asked.all])
        return [score_item(task, asked, get) for asked in items]

    def _answer(self, title: str, requests: Sequence[Question]) -> None:
        """Answer the requests that are not in the cache, in batches of all requests: resuming changes no batch."""
        requests = list(dict.fromkeys(requests))
        done = sum(self._cache.get(request) is not None for request in requests)
        if done < len(requests):
            engine = self.engine
            with self._progress(title, len(requests)) as advance:
                advance(done)
                for batch in engine.batches(requests):
                    if any(self._cache.get(request) is None for request in batch):
                        self._cache.add(engine.answer(batch))
                        done += len(batch)
                        advance(min(done, len(requests)))

    def _measure_alignment(self, task: PreparedTask) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the records of the sentence pairs, and the entry's further keys."""
        content_hash = _digest([list(pair) for pair in task.pairs])
        request = Measurement(f"alignment {self._versions.get('pivotune')}", content_hash)
        measured = self._cache.get(request)
        if measured is None:
            with self._progress(task.task.name, 2 * len(task.pairs)) as advance:
                tokenizer = self._prepared.prompter.tokenizer
                alignment = measure_alignment(self.model, tokenizer, task.pairs, progress=advance)
            measured = json.dumps(alignment._asdict())
            self._cache.add({request: measured})
        kept = json.loads(str(measured))
        records = [{"task": task.task.name, **record} for record in kept.pop("records")]
        return records, {**kept, "truncated": kept["by_layer"]["truncated"], "prompt_hash": content_hash[:16]}


def score_item(task: Task, asked: ItemRequests, answer_to: Callable[[Request], Answer | None]) -> dict[str, Any]:
    """Return the item's record in `results.items.jsonl.gz`."""
    item = asked.item
    scores = [cast(LogProbability, answer_to(request)) for request in asked.likelihoods]
    record: dict[str, Any] = {"task": task.name, "item": item.id}
    if asked.generation is None:
        # A NaN of a broken model is never the likeliest.
        values = [-math.inf if math.isnan(score.logprob) else score.logprob for score in scores]
        per_character = [value / max(1, len(text)) for value, text in zip(values, item.choices, strict=True)]
        chosen, chosen_norm = (ranked.index(max(ranked)) for ranked in (values, per_character))
        short = {key: value for key, value in item.details.items() if len(str(value)) <= _DETAIL_CHARACTERS}
        details = {key: value for key, value in short.items() if isinstance(value, (str, int))}
        record |= {"choice": chosen, "correct": int(chosen == item.gold), "correct_norm": int(chosen_norm == item.gold)}
        record |= {"log_likelihoods": [score.logprob for score in scores], **details, "answer": item.choices[chosen]}
    else:
        text = cast(str, answer_to(asked.generation)).strip()
        assert task.score is not None
        is_right = in_language(text, task.answer_language) if task.answer_language and text else None
        record |= {**task.score(text, item), "answer": text, "answer_characters": len(text), "empty": int(not text)}
        record["in_language"] = None if is_right is None else int(is_right)
    gold = scores[0] if item.gold is None else scores[item.gold]
    record |= {"gold_nll": -gold.logprob, "gold_tokens": gold.tokens, "gold_characters": len(item.gold_answer)}
    query = item.query
    record["question"] = query if len(query) <= _QUESTION_CHARACTERS else f"…{query[-_QUESTION_CHARACTERS:]}"
    record["gold"] = item.gold_answer
    if asked.pivot is not None:
        english = cast(str, answer_to(asked.pivot))
        record |= {"english_part": english, "no_marker": int(not english.endswith(asked.pivot.stop))}
    if asked.context.truncated:
        record["truncated"] = True
    return record


def _figures(metrics: Sequence[Metric], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return value, standard error and count of every metric; those of the first one at the top level too."""
    figures: dict[str, dict[str, Any]] = {}
    for metric in metrics:
        figure = summarize(metric, records)
        if figure.n:
            figures[metric.name] = figure.to_dict()
    primary = metrics[0].name
    top = {key: figures[primary][key] for key in ("value", "stderr", "n", "higher_is_better")}
    return {"metric": primary, **top, "metrics": figures}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()
