"""Which tasks there are, and what a word after `--tasks` stands for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from pivotune.errors import UsageError
from pivotune.evaluation.alignment import AlignmentTask, alignment_tasks
from pivotune.evaluation.tasks.base import Benchmark, Task
from pivotune.text.languages import find_language

AnyTask = Task | AlignmentTask

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
ALIGNMENT = "alignment"


@lru_cache(maxsize=1)
def benchmarks() -> dict[str, Benchmark]:
    """All benchmarks by name."""
    from pivotune.evaluation.tasks.mkqa import MKQA
    from pivotune.evaluation.tasks.mmlu import MMLU
    from pivotune.evaluation.tasks.squad import MLQA, XQUAD
    from pivotune.evaluation.tasks.translation import FLORES, NTREX, PAIRS, TATOEBA
    from pivotune.evaluation.tasks.truthfulqa import TRUTHFULQA
    from pivotune.evaluation.tasks.xcopa import XCOPA
    from pivotune.evaluation.tasks.xnli import XNLI
    from pivotune.evaluation.tasks.xstorycloze import XSTORYCLOZE

    known = (XQUAD, MLQA, MKQA, TRUTHFULQA, XNLI, XCOPA, XSTORYCLOZE, MMLU, FLORES, NTREX, TATOEBA, PAIRS)
    return {benchmark.name: benchmark for benchmark in known}


def find_tasks(names: Iterable[str], languages: Sequence[str] = (), own: str | None = None) -> list[AnyTask]:
    """The tasks that these names stand for, in order, each once.

    Args:
        names: tasks (`xquad_vi`, `flores_en-vi`), sets (`xquad`), groups (`qa`, `qa_vi`, `paper`, `english`), alignment
            (`alignment_vi`, `alignment_tatoeba_vi`) or any multiple-choice task of lm-evaluation-harness.
        languages: what sets and groups without a language are evaluated in.
        own: the run's language, where `languages` is empty; `paper` is vi, ar and zh all the same.

    Raises:
        UsageError: an unknown name, a language that a set does not have, or a set without any language.
    """
    tasks: dict[str, AnyTask] = {}
    for name in names:
        chosen = [own] if own and not languages and name.strip() != "paper" else languages
        for task in _expand(name.strip(), chosen):
            tasks.setdefault(task.name, task)
    if not tasks:
        raise UsageError("--tasks: none given")
    return list(tasks.values())


def _expand(name: str, languages: Sequence[str]) -> list[AnyTask]:
    known = benchmarks()
    head, _, tail = name.partition("_")
    if head in GROUPS:
        return _group(head, [tail] if tail else languages)
    if head == ALIGNMENT:
        return _alignment(tail, languages)
    if name in known:
        return [task for language in _needed(name, languages) for task in _of(known[name], language)]
    if head in known and (_LANGUAGE.fullmatch(tail) or tail in known[head].languages or "-" in tail):
        return _task(known[head], tail)
    return [_harness(name)]


def _group(group: str, languages: Sequence[str]) -> list[AnyTask]:
    """A group leaves out sets that are not published in a language, and adds English: harm to it is always shown."""
    known = benchmarks()
    if group == "english":
        wanted: Sequence[str] = ("en",)
    else:
        wanted = PAPER_LANGUAGES if group == "paper" and not languages else _needed(group, languages)
    tasks = [
        task
        for language in wanted
        for name in GROUPS[group]
        if _has(known[name], language)
        for task in known[name].tasks(language)
    ]
    if not tasks:
        raise UsageError(f"--tasks: no set of the group {group} is published in {', '.join(wanted)}")
    if "en" in wanted or group == "translation":
        return list(tasks)
    english = [task for name in GROUPS[group] if _has(known[name], "en") for task in known[name].tasks("en")]
    return [*tasks, *english]


def _has(benchmark: Benchmark, language: str) -> bool:
    return language in benchmark.languages and not (language == "en" and benchmark.name in _TRANSLATION)


def _task(benchmark: Benchmark, language: str) -> list[AnyTask]:
    """`xquad_vi`, or one direction: `flores_en-vi`."""
    if not _DIRECTION.fullmatch(language):
        return list(_of(benchmark, language))
    other = next((part for part in language.split("-", 1) if part != "en"), "en")
    found = [task for task in _of(benchmark, other) if task.name == f"{benchmark.name}_{language}"]
    if not found:
        allowed = ", ".join(task.name for task in _of(benchmark, other))
        raise UsageError(f"--tasks: no task {benchmark.name}_{language}; allowed: {allowed}")
    return list(found)


def _of(benchmark: Benchmark, language: str) -> Sequence[Task]:
    if language not in benchmark.languages:
        language = find_language(language).code
    if language in benchmark.languages or benchmark.open_ended:
        return benchmark.tasks(language)
    raise UsageError(
        f"--tasks: {benchmark.title} has no language {language!r}; it has {', '.join(sorted(benchmark.languages))}"
    )


def _alignment(tail: str, languages: Sequence[str]) -> list[AnyTask]:
    head, _, rest = tail.partition("_")
    if head in ("flores", "ntrex", "tatoeba", "pairs"):
        return [
            task
            for language in _needed(tail, [rest] if rest else languages)
            for task in alignment_tasks(head, language)
        ]
    return [
        task
        for language in _needed(ALIGNMENT, [tail] if tail else languages)
        for task in alignment_tasks(None, language)
    ]


def _needed(name: str, languages: Sequence[str]) -> Sequence[str]:
    if not languages:
        raise UsageError(f"--tasks: {name} needs a language: {name}_vi, or --lang vi")
    return languages


def _harness(name: str) -> Task:
    from pivotune.evaluation.tasks.harness import harness_task

    task = harness_task(name)
    if task is not None:
        return task
    ours = [*GROUPS, *(f"{key}_{language}" for key, b in benchmarks().items() for language in b.languages), ALIGNMENT]
    near = difflib.get_close_matches(name, ours, n=3)
    hint = f"; near: {', '.join(near)}" if near else ""
    raise UsageError(f"--tasks: no task {name!r}{hint}; `pivotune evaluate --list-tasks` names them all")
