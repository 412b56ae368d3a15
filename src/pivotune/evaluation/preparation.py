"""What is checked and read before a model is asked anything: its files, the template, the tasks and all their data."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pivotune.data.templates import Template, Turn, load_template
from pivotune.errors import UsageError
from pivotune.evaluation.alignment import AlignmentTask
from pivotune.evaluation.engine import check_backend
from pivotune.evaluation.prompts import Prompter
from pivotune.evaluation.registry import AnyTask, find_tasks
from pivotune.evaluation.scoring import ItemRequests, item_requests
from pivotune.evaluation.settings import EvaluationSettings
from pivotune.evaluation.sources import MissingDataError, Source
from pivotune.models.loading import DTYPES, check_model, load_tokenizer, read_config
from pivotune.runs.folder import read_run_config
from pivotune.training.preparation import context_length


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
    wanted = find_tasks(tasks, languages, run.data.language if run is not None else None)
    if settings.backend != "hf" and any(isinstance(task, AlignmentTask) for task in wanted):
        raise UsageError("--backend: alignment looks into the layers, which only hf can")
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


def _check_settings(settings: EvaluationSettings) -> None:
    for name in ("limit", "max_new_tokens", "batch_size"):
        value = getattr(settings, name)
        if isinstance(value, int) and value < 1:
            raise UsageError(f"--{name.replace('_', '-')}: {value} found; allowed: 1 or more")
    if settings.dtype not in DTYPES:
        raise UsageError(f"--dtype: {settings.dtype!r} found; allowed: {', '.join(DTYPES)}")
    if settings.comet is not None:
        _check_comet(settings.comet)
    if settings.data_dir is not None and not settings.data_dir.is_dir():
        raise UsageError(f"--data-dir: {settings.data_dir} is not a folder")
    for path in settings.pairs or ():
        if path is not None and not path.is_file():
            raise UsageError(f"--pairs: {path} is not a file")


def _check_comet(checkpoint: str) -> None:
    """COMET that was asked for must be there; without `--comet` it is taken only where it is at hand."""
    from pivotune.evaluation.metrics.comet import CometUnavailableError, find_checkpoint

    try:
        find_checkpoint(checkpoint)
    except CometUnavailableError as error:
        raise UsageError(f"--comet: {error}") from error


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
