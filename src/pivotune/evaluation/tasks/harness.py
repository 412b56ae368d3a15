"""Tasks of lm-evaluation-harness: its prompts, choices and labels, on our own records or on the Hub's.

The harness is used through its public `TaskManager`: a group of one task with an overridden `custom_dataset`, so that
nothing is downloaded for tasks with files of our own.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pivotune.errors import UsageError
from pivotune.evaluation.tasks.base import ACCURACY, Item, Task, TaskData
from pivotune.evaluation.tasks.tables import Source, hub_name
from pivotune.text.languages import find_language

# Languages of Okapi's translations of MMLU and TruthfulQA.
OKAPI_LANGUAGES = (
    "ar", "bn", "ca", "da", "de", "es", "eu", "fr", "gu", "hi", "hr", "hu", "hy", "id", "it", "kn",
    "ml", "mr", "ne", "nl", "pt", "ro", "ru", "sk", "sr", "sv", "ta", "te", "uk", "vi", "zh",
)  # fmt: skip


def harness_items(
    name: str, docs: Mapping[str, Mapping[str, Any]], details: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Item]:
    """Return items with the texts of the harness's task `name`; `docs` and `details` are by item id.

    A document has the fields of the harness's dataset on the Hub.
    """
    manager = _manager(name)
    from datasets import Dataset

    # The harness loads the first record only; the texts of all are made one by one below, without few-shot examples.
    data = {"test": Dataset.from_list([dict(next(iter(docs.values())))])}
    changes = {"custom_dataset": lambda **_: data, "test_split": "test", "validation_split": None,
               "training_split": None, "fewshot_split": None, "fewshot_config": None}  # fmt: skip
    with _quiet():
        loaded = manager.load({"group": "pivotune", "task": [{"task": name, **changes}]})
    task = loaded["tasks"][name]
    return [_item(task, identifier, doc, (details or {}).get(identifier, {})) for identifier, doc in docs.items()]


def harness_task(name: str) -> Task | None:
    """Return any other multiple-choice task of the harness by its own name, zero-shot, from the Hub; None if unknown.

    `language` is `und` for a name without a language.
    """
    entry = _manager(name).task_index.get(name) if _is_named(name) else None
    if entry is None:
        return None
    if entry.kind.name in ("GROUP", "TAG"):
        raise UsageError(f"{name}: a group of lm-evaluation-harness's tasks; name the ones you want")
    kind = "Python class" if entry.kind.name == "PY_TASK" else (entry.cfg or {}).get("output_type", "generate_until")
    if kind != "multiple_choice":
        raise _unsupported(name, f"of kind {kind}")
    language = "und"
    parts = name.split("_")
    # The longest of the last parts that is a code: `vi` in `arc_vi`, `vie_Latn` in `belebele_vie_Latn`.
    for first in range(len(parts) - 1, 0, -1):
        with suppress(UsageError):
            language = find_language("_".join(parts[first:])).code
    return Task(name, name, language, "choice", (ACCURACY,), partial(_read_from_hub, name))


def _read_from_hub(name: str, source: Source) -> TaskData:
    try:
        with _quiet():
            task = _manager(name).load(name)["tasks"][name]
    except UsageError:
        raise
    except Exception as error:  # the Hub, the network, the task's own code: they share no narrower type
        reason = " ".join(str(error).split()) or type(error).__name__
        problem = f"lm-evaluation-harness cannot load it ({reason[:200]})"
        raise UsageError(f"{name}: {problem}; such tasks are read from the Hub") from error
    config = task.config
    if task.multiple_input or task.multiple_target or config.doc_to_image or config.doc_to_audio or config.gen_prefix:
        raise _unsupported(name, "of several inputs or targets")
    docs = {config.test_split: task.test_docs, config.validation_split: task.validation_docs}
    docs.pop(None, None)
    split = source.split or next(iter(docs))
    if split not in docs:
        raise UsageError(f"{name}: has no split {split!r}; allowed: {', '.join(docs)}")
    with _quiet():
        items = [_item(task, str(number), doc, {}) for number, doc in enumerate(docs[split](), start=1)]
    return TaskData(items, split, [hub_name(config.dataset_path, config.dataset_name)])


def _item(task: Any, identifier: str, doc: Mapping[str, Any], details: Mapping[str, Any]) -> Item:
    choices = tuple(task.doc_to_choice(doc))
    target = task.doc_to_target(doc)
    gold = choices.index(target) if target in choices else target
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        where = f"{task.config.task}, item {identifier}"
        raise UsageError(f"{where}: answer {target!r:.60}; allowed: one of {len(choices)}")
    # A task's description (none of our own sets has one) stands before the question, as without a chat template.
    description = task.resolve_field(doc, task.config.description) or ""
    query = f"{description}{task.doc_to_text(doc)}"
    return Item(identifier, query, choices=choices, gold=gold, delimiter=task.config.target_delimiter, details=details)


def _is_named(name: str) -> bool:
    """Return False if no file of the harness has this name: reading them takes a tenth of the index's time."""
    package = find_spec("lm_eval")
    folders = [Path(path) for path in (package and package.submodule_search_locations) or ()]
    files = (path for folder in folders for path in (folder / "tasks").rglob("*yaml*") if path.is_file())
    return not folders or any(name in path.read_text(encoding="utf-8", errors="replace") for path in files)


@lru_cache(maxsize=1)
def _task_manager() -> Any:
    with _quiet():
        from lm_eval.tasks import TaskManager

        return TaskManager()


def _manager(task: str) -> Any:
    try:
        return _task_manager()
    except ModuleNotFoundError as error:
        needs = f"needs lm-evaluation-harness ({error.name} is not installed)"
        raise UsageError(f"{task}: {needs}: pip install 'pivotune[eval]'") from error


def _unsupported(name: str, kind: str) -> UsageError:
    command = f"lm_eval --model hf --model_args pretrained=RUN/model --tasks {name}"
    return UsageError(f"{name}: a task {kind} is not scored here; `{command}` runs it")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the harness's warnings about its own task files, and progress bars over a few hundred rows."""
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
