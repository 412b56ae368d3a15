"""Tasks as lm-evaluation-harness defines them: its prompts, choices and labels, on data we read ourselves or from the Hub.

The harness is asked through its public `TaskManager`: a group of one task whose `custom_dataset` is overridden, so that
nothing is downloaded for the tasks whose files we read ourselves.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from typing import Any

from pivotune.errors import UsageError
from pivotune.evaluation.sources import Source, hub_name
from pivotune.evaluation.tasks.base import Item, Task, TaskData
from pivotune.results.metrics import Metric
from pivotune.text.languages import find_language

ACCURACY = Metric("accuracy", "mean", ("correct",), 100.0)
# fmt: off
OKAPI_LANGUAGES = (
    "ar", "bn", "ca", "da", "de", "es", "eu", "fr", "gu", "hi", "hr", "hu", "hy", "id", "it", "kn",
    "ml", "mr", "ne", "nl", "pt", "ro", "ru", "sk", "sr", "sv", "ta", "te", "uk", "vi", "zh",
)  # those into which Okapi translated MMLU and TruthfulQA
# fmt: on

_UNDETERMINED = "und"
_NO_DETAILS: Mapping[str, Any] = {}


def harness_items(
    name: str,
    docs: Mapping[str, Mapping[str, Any]],
    details: Mapping[str, Mapping[str, Any]] = _NO_DETAILS,
) -> list[Item]:
    """Items with the texts of the harness's task `name`.

    Args:
        docs: item id -> record with the fields of the dataset that the harness reads from the Hub.
        details: item id -> what the items shall carry besides.
    """
    task = _task_on(name, list(docs.values()))
    return [_item(task, identifier, doc, details.get(identifier, {})) for identifier, doc in docs.items()]


def harness_task(name: str) -> Task | None:
    """Any other task of the harness by its own name (`belebele_vie_Latn`), zero-shot, read from the Hub by the harness.

    None where the harness has no task of that name. `language` is `und` where the name does not tell it.

    Raises:
        UsageError: the harness is not installed, or the task is not of a kind that is scored here.
    """
    entry = _manager(name).task_index.get(name)
    if entry is None:
        return None
    if entry.kind.name in ("GROUP", "TAG"):
        raise UsageError(f"{name}: a group of lm-evaluation-harness's tasks; name the ones you want")
    kind = "Python class" if entry.kind.name == "PY_TASK" else (entry.cfg or {}).get("output_type", "generate_until")
    if kind != "multiple_choice":
        raise _other_kind(name, f"of kind {kind}")
    return Task(name, name, _language(name), "choice", (ACCURACY,), partial(_read_through_harness, name))


def _language(name: str) -> str:
    """That of the name's last parts: `vi` in `arc_vi`, `vie_Latn` in `belebele_vie_Latn`."""
    parts = name.split("_")
    for first in range(1, len(parts)):
        with suppress(UsageError):
            return find_language("_".join(parts[first:])).code
    return _UNDETERMINED


@lru_cache(maxsize=1)
def _task_manager() -> Any:
    with _quiet():
        from lm_eval.tasks import TaskManager

        return TaskManager()


def _manager(task: str) -> Any:
    try:
        return _task_manager()
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{task}: needs lm-evaluation-harness ({error.name} is not installed): pip install 'pivotune[eval]'"
        ) from error


def _task_on(name: str, docs: Sequence[Mapping[str, Any]]) -> Any:
    """The harness's own task object over these records, without its few-shot examples."""
    manager = _manager(name)
    from datasets import Dataset

    # The harness looks at the first record only; the texts of all are asked for one by one.
    data = {"test": Dataset.from_list([dict(docs[0])])}
    changes = {"custom_dataset": lambda **_: data, "test_split": "test", "validation_split": None,
               "training_split": None, "fewshot_split": None, "fewshot_config": None}  # fmt: skip
    with _quiet():
        loaded = manager.load({"group": "pivotune", "task": [{"task": name, **changes}]})
    return loaded["tasks"][name]


def _item(task: Any, identifier: str, doc: Mapping[str, Any], details: Mapping[str, Any]) -> Item:
    choices = tuple(task.doc_to_choice(doc))
    target = task.doc_to_target(doc)
    gold = choices.index(target) if target in choices else target
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise UsageError(
            f"{task.config.task}, item {identifier}: answer {target!r:.60}; allowed: one of {len(choices)}"
        )
    # A task's description (none of our own sets has one) stands before the question, as without a chat template.
    description = task.resolve_field(doc, task.config.description) or ""
    query = f"{description}{task.doc_to_text(doc)}"
    return Item(identifier, query, choices=choices, gold=gold, delimiter=task.config.target_delimiter, details=details)


def _read_through_harness(name: str, source: Source) -> TaskData:
    task = _load(name)
    config = task.config
    if task.multiple_input or task.multiple_target or config.doc_to_image or config.doc_to_audio or config.gen_prefix:
        raise _other_kind(name, "of several inputs or targets")
    docs = {config.test_split: task.test_docs, config.validation_split: task.validation_docs}
    docs.pop(None, None)
    split = source.split or next(iter(docs))
    if split not in docs:
        raise UsageError(f"{name}: has no split {split!r}; allowed: {', '.join(docs)}")
    with _quiet():
        items = [_item(task, str(number), doc, {}) for number, doc in enumerate(docs[split](), start=1)]
    hub = hub_name(config.dataset_path, config.dataset_name)
    return TaskData(items, split, [hub])


def _load(name: str) -> Any:
    try:
        with _quiet():
            return _manager(name).load(name)["tasks"][name]
    except UsageError:
        raise
    except Exception as error:  # the Hub, the network, the task's own code: they share no narrower type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"{name}: lm-evaluation-harness cannot load it ({reason[:200]}); such tasks are read from the Hub"
        ) from error


def _other_kind(name: str, kind: str) -> UsageError:
    command = f"lm_eval --model hf --model_args pretrained=RUN/model --tasks {name}"
    return UsageError(f"{name}: a task {kind} is not scored here; `{command}` runs it")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's warnings about its own task files, and without bars over a few hundred rows."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger, bars = logging.getLogger("lm_eval"), not are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if bars:
            enable_progress_bars()
