"""All benchmarks, the tasks of a name after `--tasks`, and the texts of their items."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from pivotune.errors import UsageError
from pivotune.evaluation.tasks.base import Benchmark, Item, Task
from pivotune.evaluation.tasks.tables import Source
from pivotune.evaluation.tasks.translation import ALIGNMENT, PARALLEL_READERS, SentencePair, alignment_task
from pivotune.text.languages import find_language

# The paper's eight benchmarks and FLORES (arXiv 2503.01275, section "Settings").
_QA = ("xquad", "mlqa", "mkqa")
_UNDERSTANDING = ("truthfulqa", "xnli", "xcopa", "xstorycloze", "mmlu")
_TRANSLATION = ("flores",)
GROUPS: dict[str, tuple[str, ...]] = {
    "paper": (*_QA, *_UNDERSTANDING, *_TRANSLATION),
    "qa": _QA,
    "understanding": _UNDERSTANDING,
    "translation": _TRANSLATION,
    "english": (*_QA, *_UNDERSTANDING),
}
PAPER_LANGUAGES = ("vi", "ar", "zh")
# A code of two or three letters, with a script or a region: `vi`, `zho_Hans`, `pt-BR`. `vi_en` is two languages.
_DIRECTION = re.compile(r"[a-z]{2,3}(_[A-Z][a-z]{3})?-[a-z]{2,3}(_[A-Z][a-z]{3})?")
_LANGUAGE = re.compile(r"[a-z]{2,3}(_[A-Z][a-z]{3})?([-_][A-Z]{2})?")


@lru_cache(maxsize=1)
def benchmarks() -> dict[str, Benchmark]:
    """Return all benchmarks by name."""
    from pivotune.evaluation.tasks.mmlu import MMLU
    from pivotune.evaluation.tasks.question_answering import MKQA, MLQA, XQUAD
    from pivotune.evaluation.tasks.translation import FLORES, NTREX, PAIRS, TATOEBA
    from pivotune.evaluation.tasks.truthfulqa import TRUTHFULQA
    from pivotune.evaluation.tasks.understanding import XCOPA, XNLI, XSTORYCLOZE

    known = (XQUAD, MLQA, MKQA, TRUTHFULQA, XNLI, XCOPA, XSTORYCLOZE, MMLU, FLORES, NTREX, TATOEBA, PAIRS)
    return {benchmark.name: benchmark for benchmark in known}


def find_tasks(names: Iterable[str], languages: Sequence[str] = (), own: Sequence[str] = ()) -> list[Task]:
    """Return the tasks of these names, in order, each once.

    Args:
        names: tasks (`xquad_vi`, `flores_en-vi`), sets (`xquad`), groups (`qa`, `qa_vi`, `paper`, `english`), alignment
            (`alignment_vi`, `alignment_tatoeba_vi`) or any multiple-choice task of lm-evaluation-harness.
        languages: for sets and groups without a language.
        own: the run's languages, in place of empty `languages`; `paper` stays vi, ar and zh.
    """
    tasks: dict[str, Task] = {}
    for name in names:
        chosen = own if not languages and name.strip() != "paper" else languages
        for task in _expand(name.strip(), chosen):
            tasks.setdefault(task.name, task)
    if not tasks:
        raise UsageError("--tasks: none given")
    return list(tasks.values())


def _expand(name: str, languages: Sequence[str]) -> Sequence[Task]:
    known = benchmarks()
    head, _, tail = name.partition("_")
    if head in GROUPS:
        return _group(head, [tail] if tail else languages)
    if head == ALIGNMENT:
        set_name, _, rest = tail.partition("_")
        known_set, rest = (set_name, rest) if set_name in PARALLEL_READERS else (None, tail)
        chosen = _needed(tail if known_set else head, [rest] if rest else languages)
        return [alignment_task(known_set, _code(language)) for language in chosen]
    if name in known:
        return [task for language in _needed(name, languages) for task in _in_language(known[name], language)]
    if head in known and _DIRECTION.fullmatch(tail):
        other = next((part for part in tail.split("-", 1) if part != "en"), "en")
        tasks = _in_language(known[head], other)
        if found := [task for task in tasks if task.name == name]:
            return found
        raise UsageError(f"--tasks: no task {name}; allowed: {', '.join(task.name for task in tasks)}")
    if head in known and (_LANGUAGE.fullmatch(tail) or tail in known[head].languages or "-" in tail):
        return _in_language(known[head], tail)
    from pivotune.evaluation.tasks.harness import harness_task

    if task := harness_task(name):
        return [task]
    ours = [*GROUPS, *(f"{key}_{language}" for key, b in known.items() for language in b.languages), ALIGNMENT]
    near = difflib.get_close_matches(name, ours, n=3)
    hint = f"; near: {', '.join(near)}" if near else ""
    raise UsageError(f"--tasks: no task {name!r}{hint}; `pivotune evaluate --list-tasks` names them all")


def _group(group: str, languages: Sequence[str]) -> Sequence[Task]:
    """Return a group's published tasks, and English ones too: harm to English is always shown."""
    if group in ("english", "paper"):
        languages = ("en",) if group == "english" else languages or PAPER_LANGUAGES
    languages = _needed(group, languages)

    def published(language: str) -> list[Task]:
        sets = [name for name in GROUPS[group] if not (language == "en" and name in _TRANSLATION)]
        chosen = [benchmarks()[name] for name in sets]
        return [task for benchmark in chosen if language in benchmark.languages for task in benchmark.tasks(language)]

    tasks = [task for language in languages for task in published(language)]
    if not tasks:
        raise UsageError(f"--tasks: no set of the group {group} is published in {', '.join(languages)}")
    return tasks if "en" in languages or group == "translation" else [*tasks, *published("en")]


def _in_language(benchmark: Benchmark, language: str) -> Sequence[Task]:
    if language not in benchmark.languages:
        language = _code(language)
    if language in benchmark.languages or benchmark.open_ended:
        return benchmark.tasks(language)
    has = ", ".join(sorted(benchmark.languages))
    raise UsageError(f"--tasks: {benchmark.title} has no language {language!r}; it has {has}")


def _code(language: str) -> str:
    try:
        return find_language(language).code
    except UsageError as error:
        raise UsageError(f"--tasks: {error}") from error


def _needed(name: str, languages: Sequence[str]) -> Sequence[str]:
    if not languages:
        raise UsageError(f"--tasks: {name} needs a language: {name}_vi, or --lang vi")
    return languages


def evaluation_texts(
    names: Iterable[str], languages: Sequence[str], data_dir: Path | None
) -> dict[str, list[list[str]]]:
    """Return the texts of every item of the tasks, to compare with training rows: question lines, gold answer, sentences.

    Args:
        names, languages: as in `find_tasks`; `data_dir` as in `EvaluationSettings`.

    Raises:
        UsageError: an unknown task, or one without data.
    """
    source = Source(data_dir)
    return {task.name: _item_texts(task.read(source).items) for task in find_tasks(names, languages)}


def _item_texts(items: Sequence[Item | SentencePair]) -> list[list[str]]:
    """Return the texts of each item, without the lines and labels (`Question:`) that over half of the items share."""
    texts = [
        [*item.query.splitlines(), item.gold_answer] if isinstance(item, Item) else [item.target, item.english]
        for item in items
    ]
    counts = Counter(part for lines in texts for part in {part for line in lines for part in (line, _label(line))})
    shared = {part for part, count in counts.items() if part and 2 * count > len(items) > 1}
    kept = [[line for line in lines if line not in shared] for lines in texts]
    return [[line.removeprefix(label) if (label := _label(line)) in shared else line for line in own] for own in kept]


def _label(line: str) -> str:
    head, colon, _ = line.partition(":")
    return head + colon if colon else ""
