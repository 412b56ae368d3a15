"""XStoryCloze: which of two sentences ends a story of four? 11 languages (Lin et al., 2022).

Prompt and answers are lm-evaluation-harness's `xstorycloze_{language}`: the four sentences, then either ending.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from pivotune.evaluation.sources import Source
from pivotune.evaluation.tasks.base import Benchmark, Task, TaskData
from pivotune.evaluation.tasks.harness import ACCURACY, harness_items
from pivotune.evaluation.tasks.tables import Record, Split, index_by_id, open_set, read_table

HOMEPAGE = "https://huggingface.co/datasets/juletxara/xstory_cloze"
HUB = "juletxara/xstory_cloze"

_ENDINGS = {"1": 1, "2": 2}
# The names of the publisher's release, then those of the files on the Hub.
_TEXTS = {
    **{f"input_sentence_{number}": (f"InputSentence{number}", f"input_sentence_{number}") for number in range(1, 5)},
    **{f"sentence_quiz{number}": (f"RandomFifthSentenceQuiz{number}", f"sentence_quiz{number}") for number in (1, 2)},
}
_COLUMNS = {
    "story_id": ("InputStoryid", "story_id"),
    **_TEXTS,
    "answer_right_ending": ("AnswerRightEnding", "answer_right_ending"),
}


def _read(language: str, source: Source) -> TaskData:
    task = f"xstorycloze_{language}"
    split = Split("eval", [f"spring2016.val.{language}.tsv.split_20_80_eval.tsv"], ("validation", "test"))
    # Copies with and without CSV quoting are in use.
    read = partial(read_table, columns=_COLUMNS, header=True, unquote=True)
    opened = open_set(task, source, [split], HOMEPAGE, read=read, hub=(HUB, language), columns=_COLUMNS)
    docs = index_by_id(task, opened.origin, map(_doc, opened.records))
    return TaskData(harness_items(task, docs), opened.split, opened.origin)


def _doc(record: Record) -> tuple[str, Record, dict[str, Any]]:
    doc = {name: record.text(name) for name in _TEXTS}
    return (
        record.text("story_id"),
        record,
        {**doc, "answer_right_ending": record.label("answer_right_ending", _ENDINGS)},
    )


def _tasks(language: str) -> list[Task]:
    return [Task(f"xstorycloze_{language}", "xstorycloze", language, "choice", (ACCURACY,), partial(_read, language))]


XSTORYCLOZE = Benchmark(
    name="xstorycloze",
    title="XStoryCloze",
    languages=("ar", "en", "es", "eu", "hi", "id", "my", "ru", "sw", "te", "zh"),
    tasks=_tasks,
    homepage=HOMEPAGE,
)
