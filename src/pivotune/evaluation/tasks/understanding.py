"""XNLI, XCOPA and XStoryCloze: multiple choice with the prompts and choices of lm-evaluation-harness.

- XNLI (Conneau et al., 2018): inference between two sentences, 15 languages, the harness's `xnli_{language}`. The three
  whole texts "premise, right? Yes|Also|No, hypothesis" in the language are compared by likelihood, after an empty
  question.
- XCOPA (Ponti et al., 2020): the cause or the effect of a sentence, 11 languages, the harness's `xcopa_{language}`, in
  English its `copa`. Premise without full stop, a connective of the language (because, therefore), two sentences in
  lower case.
- XStoryCloze (Lin et al., 2022): the end of a story of four sentences, 11 languages, the harness's
  `xstorycloze_{language}`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from pivotune.evaluation.tasks import tables
from pivotune.evaluation.tasks.base import TaskData, choice_benchmark
from pivotune.evaluation.tasks.harness import harness_items
from pivotune.evaluation.tasks.tables import OpenedSet, Record, Source, Split

# Id, place and the harness's fields of one question.
HarnessDoc = tuple[str, str, Mapping[str, Any]]


def _task_data(
    task: str, opened: OpenedSet, docs: Callable[[Record], Iterable[HarnessDoc]], harness_name: str | None = None
) -> TaskData:
    found = tables.by_id(task, opened.origin, (doc for record in opened.records for doc in docs(record)))
    return TaskData(harness_items(harness_name or task, found), opened.split, opened.origin)


_XNLI_HOMEPAGE = "https://github.com/facebookresearch/XNLI"
_XNLI_LANGUAGES = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")
_XNLI_LABELS = {"entailment": 0, "neutral": 1, "contradiction": 2, "contradictory": 2, "0": 0, "1": 1, "2": 2}
_XNLI_COLUMNS = {
    "premise": ("premise", "sentence1"),
    "hypothesis": ("hypothesis", "sentence2"),
    "label": ("label", "gold_label"),
}


def _read_xnli(language: str, source: Source) -> TaskData:
    task = f"xnli_{language}"
    # XTREME's files (one language each; premise, hypothesis, label) and XNLI-1.0's (all languages in one).
    splits = [
        Split("validation", (f"dev-{language}.tsv", "xnli.dev.tsv"), ("val", "dev")),
        Split("test", (f"test-{language}.labelled.tsv", f"test-{language}.tsv", "xnli.test.tsv")),
    ]
    read = partial(tables.read_table, columns=_XNLI_COLUMNS)
    hub = ("facebook/xnli", language)
    opened = tables.open_set(task, source, splits, _XNLI_HOMEPAGE, read=read, hub=hub, columns=_XNLI_COLUMNS)

    def docs(record: Record) -> Iterator[HarnessDoc]:
        if record.values.get("language", language) == language:
            texts = {name: record.text(name) for name in ("premise", "hypothesis")}
            identifier = record.values.get("pairID") or str(record.number)
            yield identifier, record.place, {**texts, "label": record.label("label", _XNLI_LABELS)}

    return _task_data(task, opened, docs)


_XCOPA_HOMEPAGE = "https://github.com/cambridgeltl/xcopa"
_COPA_HOMEPAGE = "https://super.gluebenchmark.com/tasks"
_XCOPA_LANGUAGES = ("en", "et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh")
_XCOPA_COLUMNS = {name: (name,) for name in ("premise", "choice1", "choice2", "question", "label")}


def _read_xcopa(language: str, source: Source) -> TaskData:
    task, is_english = f"xcopa_{language}", language == "en"
    test, validation = (f"{part}.{language}.jsonl" for part in ("test", "val"))
    copa = ["COPA/val.jsonl"] if is_english else []
    patterns = [*copa, f"data/{language}/{validation}", validation]
    splits = [
        Split("test", [f"data/{language}/{test}", test], files=test),
        Split("validation", patterns, ("val", "dev"), files=" or ".join([*copa, validation])),
    ]
    opened = tables.open_set(
        task,
        source,
        # Test is the reported split; English COPA's test set has no answers.
        splits[::-1] if is_english else splits,
        _COPA_HOMEPAGE if is_english else _XCOPA_HOMEPAGE,
        read=partial(tables.read_objects, columns=_XCOPA_COLUMNS),
        hub=("aps/super_glue", "copa") if is_english else ("cambridgeltl/xcopa", language),
        columns=_XCOPA_COLUMNS,
        # `data-gmt` has the same file names with texts translated into English.
        keep=lambda path: "data-gmt" not in path.parts,
    )

    def docs(record: Record) -> Iterator[HarnessDoc]:
        texts = {name: record.text(name) for name in ("premise", "choice1", "choice2")}
        question = record.label("question", {"cause": "cause", "effect": "effect"})
        label = record.label("label", {"0": 0, "1": 1})
        identifier = str(record.values.get("idx", record.number))
        yield identifier, record.place, {**texts, "question": question, "label": label}

    return _task_data(task, opened, docs, "copa" if is_english else None)


_STORY_HOMEPAGE = "https://huggingface.co/datasets/juletxara/xstory_cloze"
_STORY_LANGUAGES = ("ar", "en", "es", "eu", "hi", "id", "my", "ru", "sw", "te", "zh")
# Names of the publisher's release, then those of the files on the Hub.
_STORY_TEXTS = {
    **{f"input_sentence_{number}": (f"InputSentence{number}", f"input_sentence_{number}") for number in range(1, 5)},
    **{f"sentence_quiz{number}": (f"RandomFifthSentenceQuiz{number}", f"sentence_quiz{number}") for number in (1, 2)},
}
_STORY_COLUMNS = {
    "story_id": ("InputStoryid", "story_id"),
    **_STORY_TEXTS,
    "answer_right_ending": ("AnswerRightEnding", "answer_right_ending"),
}


def _read_xstorycloze(language: str, source: Source) -> TaskData:
    task = f"xstorycloze_{language}"
    splits = [Split("eval", [f"spring2016.val.{language}.tsv.split_20_80_eval.tsv"], ("validation", "test"))]
    # Copies with and without CSV quoting are in use.
    read = partial(tables.read_table, columns=_STORY_COLUMNS, header=True, unquote=True)
    hub = ("juletxara/xstory_cloze", language)
    opened = tables.open_set(task, source, splits, _STORY_HOMEPAGE, read=read, hub=hub, columns=_STORY_COLUMNS)

    def docs(record: Record) -> Iterator[HarnessDoc]:
        texts = {name: record.text(name) for name in _STORY_TEXTS}
        ending = record.label("answer_right_ending", {"1": 1, "2": 2})
        yield record.text("story_id"), record.place, {**texts, "answer_right_ending": ending}

    return _task_data(task, opened, docs)


XNLI = choice_benchmark("xnli", "XNLI", _XNLI_LANGUAGES, _XNLI_HOMEPAGE, _read_xnli)
XCOPA = choice_benchmark("xcopa", "XCOPA", _XCOPA_LANGUAGES, _XCOPA_HOMEPAGE, _read_xcopa)
XSTORYCLOZE = choice_benchmark("xstorycloze", "XStoryCloze", _STORY_LANGUAGES, _STORY_HOMEPAGE, _read_xstorycloze)
