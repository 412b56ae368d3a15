"""Settings of an evaluation, and everything checked and read before its model: files, template, tasks and their data."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pivotune.config.registry import METHODS
from pivotune.data.templates import load_template
from pivotune.errors import UsageError
from pivotune.evaluation.prompts import ItemRequests, Prompter, item_requests
from pivotune.evaluation.registry import find_tasks
from pivotune.evaluation.tasks.base import Task
from pivotune.evaluation.tasks.tables import MissingDataError, Source
from pivotune.evaluation.tasks.translation import SentencePair
from pivotune.methods.base import marker_in
from pivotune.models.loading import DTYPES, check_model, load_tokenizer, read_config
from pivotune.models.locating import locate
from pivotune.runs.folder import find_run_config

BACKENDS = ("hf", "vllm")
NO_PIVOT = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """Options of `pivotune evaluate`.

    Attributes:
        data_dir: folder with publishers' files; None reads the Hub.
        split: split of all sets; None for the usual one of each set.
        limit: items of each task; None for all.
        seed: draws the `limit` items at random; None takes the first ones, as lm-evaluation-harness does.
        template: `chat`, `alpaca`, a Jinja file, `none` for plain text, or None for the run's own.
        pivot: method with answers of two parts, whose English part is generated before the answer; `none` for plain
            answers, or None for the run's own method.
        cache: folder for answers, so that an interrupted evaluation continues; None keeps none.
        pairs: the user's own parallel text, and its English side in a separate file.
        comet: COMET checkpoint; None uses the default one if this machine has it.
        max_new_tokens: limit of an answer; None for each task's own.
        skip_missing: leave out sets without data and report them, instead of an error.
    """

    data_dir: Path | None = None
    split: str | None = None
    limit: int | None = None
    seed: int | None = None
    batch_size: int | Literal["auto"] = "auto"
    template: str | None = None
    pivot: str | None = None
    backend: str = "hf"
    dtype: str = "auto"
    cache: Path | None = None
    pairs: tuple[Path, Path | None] | None = None
    comet: str | None = None
    max_new_tokens: int | None = None
    skip_missing: bool = False
    trust_remote_code: bool = False
    revision: str | None = None


@dataclass(frozen=True)
class PreparedTask:
    """A task with its data: `requests` of its items, or `pairs` of an alignment task."""

    task: Task
    split: str
    origin: Sequence[str]
    requests: Sequence[ItemRequests] = ()
    pairs: Sequence[SentencePair] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def truncated(self) -> int:
        return sum(asked.context.truncated for asked in self.requests)

    @property
    def marker(self) -> str:
        """Return the text between English part and answer; '' where the answer is asked for at once."""
        return next((asked.marker for asked in self.requests if asked.marker), "")


@dataclass
class PreparedEvaluation:
    """A checked evaluation; no weights are loaded yet.

    Attributes:
        pivot: name of the method whose answers have two parts; `none` for plain answers.
        missing: one message per task without data.
    """

    model: str
    method: str | None
    settings: EvaluationSettings
    prompter: Prompter
    pivot: str
    tasks: list[PreparedTask]
    missing: list[str]


def prepare_evaluation(
    model: str | Path, tasks: Sequence[str], settings: EvaluationSettings, languages: Sequence[str] = ()
) -> PreparedEvaluation:
    """Check the model's files, the template, all task names and all data, without loading weights.

    Args:
        model: run folder, model folder, Hub name or bundled model.
        tasks, languages: as in `find_tasks`; no languages for the run's own.
    """
    name = str(model)
    _check_settings(settings)
    files = locate(name, settings.revision)
    run = find_run_config(name)
    wanted = find_tasks(tasks, languages, run.data.languages if run else ())
    if settings.backend != "hf" and any(task.kind == "alignment" for task in wanted):
        raise UsageError("--backend: alignment needs hidden states; allowed: hf")
    options = {"trust_remote_code": settings.trust_remote_code, "revision": settings.revision}
    # Imports torch, which the checks above do not need.
    from pivotune.training.preparation import context_length

    check_model(name, **options)
    if settings.backend == "vllm" and files.is_adapter:
        raise UsageError(
            f"--backend: vllm reads whole models, and {name} holds adapters alone (quantize: 4bit); merge them into their "
            "base, or use --backend hf"
        )
    model_config = read_config(name, **options)
    tokenizer = load_tokenizer(name, **options)
    template_name = settings.template or (run.data.saved_template if run else None)
    template = None if template_name == "none" else load_template(template_name, tokenizer)
    prompter = Prompter(tokenizer, template, context_length(model_config))
    pivot = settings.pivot or (run.method if run else NO_PIVOT)
    pivot = pivot if pivot in pivot_methods() else NO_PIVOT
    found = _read_tasks(wanted, settings, prompter, pivot)
    return PreparedEvaluation(name, run.method if run else None, settings, prompter, pivot, *found)


def pivot_methods() -> list[str]:
    """Return the names of the methods whose answers have two parts."""
    return [name for name in METHODS if METHODS[name].pivot_marker is not None]


def _marker_of(task: Task, pivot: str) -> str:
    """Return the marker of a task's answers; '' for English, unknown languages, and translation, which has no pivot."""
    if pivot == NO_PIVOT or task.kind not in ("answer", "choice") or task.language in ("en", "und"):
        return ""
    return marker_in(METHODS[pivot].pivot_marker, task.language)


def _check_settings(settings: EvaluationSettings) -> None:
    choices = {"backend": BACKENDS, "dtype": DTYPES, "pivot": (None, NO_PIVOT, *pivot_methods())}
    for name, allowed in choices.items():
        if (value := getattr(settings, name)) not in allowed:
            raise UsageError(f"--{name}: {value!r} found; allowed: {', '.join(filter(None, allowed))}")
    if find_spec("lm_eval") is None:
        raise UsageError("evaluation needs lm-evaluation-harness: pip install 'pivotune[eval]'")
    if settings.backend == "vllm" and find_spec("vllm") is None:
        raise UsageError("--backend: vllm is not installed: pip install vllm, or use --backend hf")
    for name in ("limit", "max_new_tokens", "batch_size"):
        value = getattr(settings, name)
        if isinstance(value, int) and value < 1:
            raise UsageError(f"--{name.replace('_', '-')}: {value} found; allowed: 1 or more")
    if settings.comet is not None:
        # A requested COMET must be there; without `--comet` it is optional.
        from pivotune.evaluation.metrics.comet import CometUnavailableError, find_checkpoint

        try:
            find_checkpoint(settings.comet)
        except CometUnavailableError as error:
            raise UsageError(f"--comet: {error}") from error
    if settings.data_dir is not None and not settings.data_dir.is_dir():
        raise UsageError(f"--data-dir: {settings.data_dir} is not a folder")
    for path in settings.pairs or ():
        if path is not None and not path.is_file():
            raise UsageError(f"--pairs: {path} is not a file")


def _read_tasks(
    wanted: Sequence[Task], settings: EvaluationSettings, prompter: Prompter, pivot: str
) -> tuple[list[PreparedTask], list[str]]:
    """Return the tasks with their data, and a message for every task without data."""
    source = Source(settings.data_dir, settings.split, settings.pairs)
    prepared, missing = [], []
    for task in wanted:
        try:
            data = task.read(source)
        except MissingDataError as error:
            missing.append(str(error))
            continue
        items = _sample(data.items, settings)
        if not items:
            raise UsageError(f"{task.name}: {', '.join(data.origin)} holds no items")
        content: dict[str, Any] = {"pairs": items}
        if task.kind != "alignment":
            more = (prompter, settings.max_new_tokens, _marker_of(task, pivot))
            content = {"requests": [item_requests(task, item, *more) for item in items]}
        prepared.append(PreparedTask(task, data.split, data.origin, left_out=data.left_out, **content))
    if missing and (not settings.skip_missing or not prepared):
        hint = "; --skip-missing evaluates the others" if prepared else ""
        count = f"{len(missing)} of {len(wanted)} tasks have no data: " if len(missing) > 1 else ""
        raise UsageError(count + "; ".join(missing) + hint)
    return prepared, missing


def _sample(items: Sequence[Any], settings: EvaluationSettings) -> list[Any]:
    """Return all items, the first `limit`, or `limit` random ones: a smaller sample is part of a larger one."""
    if settings.limit is None or settings.limit >= len(items):
        return list(items)
    if settings.seed is None:
        return list(items[: settings.limit])
    order = sorted(range(len(items)), key=lambda index: random.Random(f"{settings.seed}:{items[index].id}").random())
    return [items[index] for index in sorted(order[: settings.limit])]
