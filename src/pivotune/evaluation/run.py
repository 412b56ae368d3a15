"""Evaluate one model on any tasks: what `pivotune evaluate` does.

`prepare_evaluation` finds everything that can be wrong and reads all data; `execute_evaluation` asks the model, task by
task, and writes each task's results as soon as it is done.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pivotune.data.templates import Template, Turn, load_template
from pivotune.errors import UsageError
from pivotune.evaluation.alignment import AlignmentTask, measure_alignment
from pivotune.evaluation.cache import AnswerCache
from pivotune.evaluation.engine import Engine, check_backend, transformers_engine, vllm_engine
from pivotune.evaluation.identity import model_fingerprint, versions
from pivotune.evaluation.metrics import Metric
from pivotune.evaluation.prompts import Prompter
from pivotune.evaluation.registry import AnyTask, find_tasks
from pivotune.evaluation.requests import Measurement, Question, Request
from pivotune.evaluation.results import check_target, write_results
from pivotune.evaluation.scoring import (
    ItemRequests,
    item_requests,
    prompt_hash,
    score_item,
    task_entry,
    task_metrics,
)
from pivotune.evaluation.settings import EvaluationSettings
from pivotune.evaluation.sources import MissingDataError, Source
from pivotune.evaluation.tasks.base import Task
from pivotune.model.loading import check_model, load_model, load_tokenizer, read_config, resolve_model
from pivotune.training.heldout import end_token_ids
from pivotune.training.lora import merge_adapters
from pivotune.training.preparation import context_length
from pivotune.training.run_folder import read_run_config

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class PreparedTask:
    """A task with its data; `requests` are the items as they are put to this model, `pairs` those of an alignment task."""

    task: AnyTask
    split: str
    origin: tuple[str, ...]
    requests: tuple[ItemRequests, ...] = ()
    pairs: Any = None
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def truncated(self) -> int:
        return sum(asked.context.truncated for asked in self.requests)


@dataclass
class PreparedEvaluation:
    """Everything that was checked before a weight was loaded."""

    model: str
    method: str | None
    settings: EvaluationSettings
    prompter: Prompter
    end_token_ids: list[int]
    tasks: list[PreparedTask]
    missing: list[str]


def prepare_evaluation(
    model: str | Path, tasks: Sequence[str], settings: EvaluationSettings, languages: Sequence[str] = ()
) -> PreparedEvaluation:
    """Check the model's files, the template, all task names and all data; loads no weights.

    Args:
        model: run folder, model folder, Hub name or bundled model.
        tasks: names as `find_tasks` takes them.
        languages: for sets and groups without a language; a run's own language where this is empty.

    Raises:
        UsageError: the first thing that is wrong, in one line.
    """
    name = str(model)
    check_backend(settings.backend)
    _check_settings(settings)
    run = _run_config(name)
    if not languages and run is not None and run.data.language:
        languages = [run.data.language]
    wanted = find_tasks(tasks, languages)
    source = {"trust_remote_code": settings.trust_remote_code, "revision": settings.revision}
    check_model(name, **source)
    model_config = read_config(name, **source)
    tokenizer = load_tokenizer(name, **source)
    template = _template(settings.template or (run.data.template if run else None), tokenizer)
    prompter = Prompter(tokenizer, template, context_length(model_config))
    prepared, missing = _read_tasks(wanted, settings, prompter)
    return PreparedEvaluation(
        model=name,
        method=run.method if run else None,
        settings=settings,
        prompter=prompter,
        end_token_ids=_template_end_ids(template, tokenizer),
        tasks=prepared,
        missing=missing,
    )


def execute_evaluation(
    prepared: PreparedEvaluation,
    out: Path,
    *,
    progress: Progress | None = None,
    on_task: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Answer, score and write every task.

    Args:
        out: a folder, or the result file itself; tasks that are in it already stay.
        on_task: called with each task's name and entry when it is written.

    Returns:
        The whole content of `results.json`.
    """
    check_target(out, prepared.model)
    session = _Session(prepared, progress or _silent)
    results: dict[str, Any] = {}
    for task in prepared.tasks:
        entry, records = session.evaluate(task)
        results = write_results(
            out, model=prepared.model, method=prepared.method, tasks={task.task.name: entry}, items=records
        )
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
        request = Measurement("alignment", hashlib.sha256(content.encode()).hexdigest())
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
        return records, {"by_layer": content["by_layer"]}

    def _with_comet(self, task: PreparedTask, records: list[dict[str, Any]]) -> tuple[list[Metric], Any]:
        """Adds COMET to translations where it is at hand; else says why not."""
        from pivotune.evaluation.comet import CometUnavailableError, comet_scores

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
            "batch_size": prepared.settings.batch_size,
            "max_length": prepared.prompter.max_length,
            "begin": prepared.prompter.begin_ids,
            "template": prepared.prompter.name,
            "versions": {name: self._versions.get(name) for name in needed},
        }

    @cached_property
    def _model(self) -> Any:
        import torch

        prepared, settings = self._prepared, self._prepared.settings
        if settings.backend != "hf":
            raise UsageError("alignment looks into the layers, which only --backend hf can")
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
                resolve_model(prepared.model), prepared.prompter, batch_size=settings.batch_size, dtype=settings.dtype
            )
        ends = {*end_token_ids(self._model, prepared.prompter.tokenizer), *prepared.end_token_ids}
        return transformers_engine(
            self._model, prepared.prompter, batch_size=settings.batch_size, end_token_ids=sorted(ends)
        )


def _check_settings(settings: EvaluationSettings) -> None:
    for name in ("limit", "max_new_tokens", "batch_size"):
        value = getattr(settings, name)
        if isinstance(value, int) and value < 1:
            raise UsageError(f"--{name.replace('_', '-')}: {value} found; allowed: 1 or more")
    if settings.data_dir is not None and not settings.data_dir.is_dir():
        raise UsageError(f"--data-dir: {settings.data_dir} is not a folder")
    for path in settings.pairs or ():
        if path is not None and not path.is_file():
            raise UsageError(f"--pairs: {path} is not a file")


def _run_config(name: str) -> Any:
    folder = Path(name).expanduser()
    return read_run_config(folder) if (folder / "config.yaml").is_file() else None


def _template(name: str | None, tokenizer: Any) -> Template | None:
    return None if name == "none" else load_template(name, tokenizer)


def _template_end_ids(template: Template | None, tokenizer: Any) -> list[int]:
    """The last token of the template's answers ends generation too (Gemma's end of turn is not its end of text)."""
    if template is None:
        return []
    completion = template.render(Turn("question", "answer")).completion
    return tokenizer(completion, add_special_tokens=False)["input_ids"][-1:]


def _read_tasks(
    wanted: Sequence[AnyTask], settings: EvaluationSettings, prompter: Prompter
) -> tuple[list[PreparedTask], list[str]]:
    source = Source(settings.data_dir, settings.split, settings.pairs)
    prepared, missing = [], []
    for task in wanted:
        try:
            prepared.append(_read_task(task, source, settings, prompter))
        except MissingDataError as error:
            missing.append(str(error))
    if missing and (not settings.skip_missing or not prepared):
        hint = "; --skip-missing evaluates the others" if prepared else ""
        count = f"{len(missing)} of {len(wanted)} tasks have no data: " if len(missing) > 1 else ""
        raise UsageError(count + "; ".join(missing) + hint)
    return prepared, missing


def _read_task(task: AnyTask, source: Source, settings: EvaluationSettings, prompter: Prompter) -> PreparedTask:
    if isinstance(task, AlignmentTask):
        text = task.read(source)
        pairs = _sample(text.pairs, settings, lambda pair: str(pair[0]))
        return PreparedTask(task, text.split, tuple(text.origin), pairs=pairs, left_out=text.left_out)
    data = task.read(source)
    items = _sample(data.items, settings, lambda item: item.id)
    if not items:
        raise UsageError(f"{task.name}: {', '.join(data.origin)} holds no items")
    requests = tuple(item_requests(task, item, prompter, settings.max_new_tokens) for item in items)
    return PreparedTask(task, data.split, tuple(data.origin), requests, left_out=data.left_out)


def _sample(items: Sequence[Any], settings: EvaluationSettings, key: Callable[[Any], str]) -> list[Any]:
    """All items, the first `limit`, or `limit` drawn by the seed: a smaller sample is part of a larger one."""
    if settings.limit is None or settings.limit >= len(items):
        return list(items)
    if settings.seed is None:
        return list(items[: settings.limit])
    order = sorted(range(len(items)), key=lambda index: random.Random(f"{settings.seed}:{key(items[index])}").random())
    return [items[index] for index in sorted(order[: settings.limit])]


def _silent(title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda done: None)
