"""Evaluate one model on any tasks: what `pivotune evaluate` does.

`prepare_evaluation` finds everything that can be wrong and reads all data; `execute_evaluation` asks the model, task by
task, and writes each task's results as soon as it is done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from pivotune.evaluation.alignment import AlignmentTask, measure_alignment
from pivotune.evaluation.cache import AnswerCache
from pivotune.evaluation.engine import Engine, transformers_engine, vllm_engine
from pivotune.evaluation.identity import model_fingerprint, versions
from pivotune.evaluation.preparation import PreparedEvaluation, PreparedTask, prepare_evaluation
from pivotune.evaluation.requests import Measurement, Question, Request
from pivotune.evaluation.scoring import (
    prompt_hash,
    score_item,
    task_entry,
    task_metrics,
)
from pivotune.evaluation.settings import EvaluationSettings
from pivotune.evaluation.tasks.base import Task
from pivotune.models.adapters import merge_adapters
from pivotune.models.loading import load_model
from pivotune.models.locating import resolve_model
from pivotune.results.files import check_target, write_results
from pivotune.results.metrics import Metric
from pivotune.training.heldout import end_token_ids

__all__ = ["PreparedEvaluation", "PreparedTask", "evaluate_model", "execute_evaluation", "prepare_evaluation"]

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


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
        model: run folder, model folder, Hub name or bundled model.
        tasks: names as `pivotune evaluate --tasks` takes them.
        out: folder or file for `results.json` and its items; None writes nothing.
        languages: for sets and groups without a language; a run's own language where this is empty.
        settings: fields of `EvaluationSettings`.

    Returns:
        The content of `results.json`.

    Raises:
        UsageError: the first thing that is wrong, in one line, before any weight is loaded.
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
    """Answer, score and write every task.

    Args:
        out: a folder, or the result file itself; tasks that are in it already stay. None writes nothing.
        on_task: called with each task's name and entry when it is written.

    Returns:
        The whole content of `results.json`.
    """
    if out is not None:
        check_target(out, prepared.model)
    session = _Session(prepared, progress or _silent)
    about: dict[str, Any] = {"model": prepared.model, "method": prepared.method}
    results: dict[str, Any] = {**about, "tasks": {}}
    for task in prepared.tasks:
        entry, records = session.evaluate(task)
        if out is None:
            results["tasks"][task.task.name] = entry
        else:
            results = write_results(out, **about, tasks={task.task.name: entry}, items=records)
        if on_task:
            on_task(task.task.name, entry)
    return results


class _Session:
    """One model over all tasks; its weights are loaded when the first answer is not in the cache."""

    def __init__(self, prepared: PreparedEvaluation, progress: Progress) -> None:
        self._prepared = prepared
        self._progress = progress
        settings = prepared.settings
        self._fingerprint = model_fingerprint(prepared.model, settings.revision)
        self._versions = versions()
        self._cache = AnswerCache(settings.cache, self._identity())

    def evaluate(self, task: PreparedTask) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """A task's entry in `results.json` and its items."""
        if isinstance(task.task, AlignmentTask):
            records, more = self._align(task, task.task)
            metrics: Sequence[Metric] = task.task.metrics
        else:
            records, more = self._ask(task, task.task), {"prompt_hash": prompt_hash(task.requests)}
            metrics, more["comet"] = self._with_comet(task, records)
            if not more["comet"]:
                del more["comet"]
        entry = {**task_entry(metrics, records), **self._about(task), **more}
        return entry, records

    def _ask(self, task: PreparedTask, definition: Task) -> list[dict[str, Any]]:
        requests = list(dict.fromkeys(request for asked in task.requests for request in asked.all))
        todo = [request for request in requests if self._cache.get(request) is None]
        if todo:
            self._answer(definition.name, requests, len(requests) - len(todo))
        return [score_item(definition, asked, self._answer_to) for asked in task.requests]

    def _answer(self, name: str, requests: list[Question], done: int) -> None:
        """Answer what is not in the cache; batches are made of all requests, so that resuming changes none of them."""
        engine = self._engine
        with self._progress(name, len(requests)) as advance:
            advance(done)
            for batch in engine.batches(requests):
                if all(self._cache.get(request) is not None for request in batch):
                    continue
                self._cache.add(engine.answer(batch))
                done += len(batch)
                advance(min(done, len(requests)))

    def _answer_to(self, request: Request) -> Any:
        answer = self._cache.get(request)
        assert answer is not None
        return answer

    def _align(self, task: PreparedTask, definition: AlignmentTask) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        import json

        content = json.dumps([list(pair) for pair in task.pairs], ensure_ascii=True)
        request = Measurement(
            f"alignment {self._versions.get('pivotune')}", hashlib.sha256(content.encode()).hexdigest()
        )
        kept = self._cache.get(request)
        if kept is None:
            with self._progress(definition.name, 2 * len(task.pairs)) as advance:
                measured = measure_alignment(
                    self._model, self._prepared.prompter.tokenizer, task.pairs, progress=advance
                )
            kept = json.dumps({"records": measured.records(), "by_layer": measured.by_layer()})
            self._cache.add({request: kept})
        content = json.loads(str(kept))
        records = [{"task": definition.name, **record} for record in content["records"]]
        by_layer = content["by_layer"]
        return records, {
            "by_layer": by_layer,
            "truncated": by_layer["truncated"],
            "prompt_hash": request.content_hash[:16],
        }

    def _with_comet(self, task: PreparedTask, records: list[dict[str, Any]]) -> tuple[list[Metric], Any]:
        """Adds COMET to translations where it is at hand; else says why not."""
        from pivotune.evaluation.metrics.comet import CometUnavailableError, comet_scores

        definition = task.task
        assert isinstance(definition, Task)
        metrics = task_metrics(definition)
        if definition.kind != "translation":
            return metrics, None
        items = [asked.item for asked in task.requests]
        try:
            scores = comet_scores(
                [str(item.details["source"]) for item in items],
                [record["answer"] for record in records],
                [item.gold_answer for item in items],
                checkpoint=self._prepared.settings.comet,
            )
        except CometUnavailableError as error:
            return metrics, f"left out: {error}"
        for record, score in zip(records, scores, strict=True):
            record["comet"] = score
        metrics.insert(len(definition.metrics), Metric("comet", "mean", ("comet",), 100.0))
        return metrics, None

    def _about(self, task: PreparedTask) -> dict[str, Any]:
        """Where an entry comes from, for readers and for `compare`, which warns where runs differ in it."""
        settings = self._prepared.settings
        return {
            "benchmark": task.task.benchmark,
            "language": task.task.language,
            "split": task.split,
            "origin": list(task.origin),
            "left_out": dict(task.left_out),
            "truncated": task.truncated,
            "model_fingerprint": self._fingerprint,
            "versions": self._versions,
            "settings": {
                "limit": settings.limit,
                "seed": settings.seed,
                "split": settings.split,
                "template": self._prepared.prompter.name,
                "max_new_tokens": settings.max_new_tokens,
                "backend": settings.backend,
                "dtype": settings.dtype,
            },
        }

    def _identity(self) -> dict[str, Any]:
        import torch

        prepared = self._prepared
        needed = ("torch", "transformers", "lm_eval", "vllm")
        return {
            "model": self._fingerprint,
            "dtype": prepared.settings.dtype,
            "backend": prepared.settings.backend,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "max_length": prepared.prompter.max_length,
            "begin": prepared.prompter.begin_ids,
            "template": prepared.prompter.name,
            "versions": {name: self._versions.get(name) for name in needed},
        }

    @cached_property
    def _model(self) -> Any:
        import torch

        prepared, settings = self._prepared, self._prepared.settings
        model: Any = load_model(
            prepared.model,
            dtype=settings.dtype,  # type: ignore[arg-type]
            trust_remote_code=settings.trust_remote_code,
            revision=settings.revision,
        )
        model = merge_adapters(model)
        return model.to("cuda") if torch.cuda.is_available() else model

    @cached_property
    def _engine(self) -> Engine:
        prepared, settings = self._prepared, self._prepared.settings
        if settings.backend == "vllm":
            return vllm_engine(
                resolve_model(prepared.model),
                prepared.prompter,
                batch_size=settings.batch_size,
                end_token_ids=prepared.end_token_ids,
                dtype=settings.dtype,
                revision=settings.revision,
                trust_remote_code=settings.trust_remote_code,
            )
        ends = {*end_token_ids(self._model, prepared.prompter.tokenizer), *prepared.end_token_ids}
        return transformers_engine(
            self._model, prepared.prompter, batch_size=settings.batch_size, end_token_ids=sorted(ends)
        )


def _silent(title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda done: None)
