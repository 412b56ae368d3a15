"""XQuAD and MLQA: extractive question answering in SQuAD's format, a passage and a question in the same language.

XQuAD (Artetxe et al., ACL 2020): SQuAD's questions translated, `xquad.vi.json`, one split. MLQA (Lewis et al., ACL 2020):
`test-context-vi-question-vi.json` and `dev-...`. Both are scored as MLQA's official script does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pivotune.data.formats import read_file
from pivotune.errors import UsageError
from pivotune.evaluation.sources import Source, hub_name, read_hub_records
from pivotune.evaluation.tasks.base import Benchmark, Item, Task, TaskData
from pivotune.evaluation.tasks.question_answering import (
    PlacedItem,
    answer_task,
    check_published,
    distinct_items,
    id_member,
    member,
    text_member,
)
from pivotune.evaluation.tasks.tables import Split, choose_split, only_file, origin_of

_XQUAD_HOMEPAGE = "https://github.com/google-deepmind/xquad"
_MLQA_HOMEPAGE = "https://github.com/facebookresearch/MLQA"
_XQUAD_LANGUAGES = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
_MLQA_LANGUAGES = ("ar", "de", "en", "es", "hi", "vi", "zh")

# Passage, question, answer, as the harness's XQuAD tasks word them (its Arabic word for the passage lacks a letter).
_LABELS = {
    "ar": ("سياق", "سؤال", "إجابة"),
    "de": ("Kontext", "Frage", "Antwort"),
    "el": ("Συμφραζόμενα", "Ερώτηση", "Απάντηση"),
    "en": ("Context", "Question", "Answer"),
    "es": ("Contexto", "Pregunta", "Respuesta"),
    "hi": ("प्रसंग", "सवाल", "उत्तर"),
    "ro": ("Context", "Întrebare", "Răspuns"),
    "ru": ("Контекст", "Вопрос", "Ответ"),
    "th": ("บริบท", "คำถาม", "คำตอบ"),
    "tr": ("Bağlam", "Soru", "Cevap"),
    "vi": ("Bối cảnh", "Câu hỏi", "Trả lời"),
    "zh": ("语境", "问题", "回答"),
}


def _xquad_tasks(language: str) -> list[Task]:
    # The publisher gives its only split no name; this is the Hub's and the harness's.
    splits = [Split("validation", [f"xquad.{language}.json"])]
    hub = ("google/xquad", f"xquad.{language}")
    return [answer_task("xquad", language, "mlqa", partial(_read, XQUAD, language, splits, hub))]


def _mlqa_tasks(language: str) -> list[Task]:
    name = f"context-{language}-question-{language}.json"
    splits = [Split("test", [f"test-{name}"]), Split("validation", [f"dev-{name}"], aliases=["val", "dev"])]
    hub = ("facebook/mlqa", f"mlqa.{language}.{language}")
    return [answer_task("mlqa", language, "mlqa", partial(_read, MLQA, language, splits, hub))]


def _read(
    benchmark: Benchmark, language: str, splits: Sequence[Split], hub: tuple[str, str], source: Source
) -> TaskData:
    task = f"{benchmark.name}_{language}"
    split, files = choose_split(task, source, splits, benchmark.homepage)
    if files:
        path = only_file(task, files)
        placed, origin = _placed_items(path, language), origin_of(source, files)
    else:
        check_published(task, language, benchmark.languages)
        placed, origin = _placed_hub_items(task, hub, split.hub_name, language), [hub_name(*hub)]
    return TaskData(distinct_items(task, origin, placed), split.name, origin)


def _placed_items(path: Path, language: str) -> Iterator[PlacedItem]:
    for article_number, article in read_file(path):
        in_article = f"{path}, article {article_number}"
        for paragraph_number, paragraph in enumerate(member(article, "paragraphs", list, in_article), start=1):
            in_paragraph = f"{in_article}, paragraph {paragraph_number}"
            passage = text_member(paragraph, "context", in_paragraph)
            for number, question in enumerate(member(paragraph, "qas", list, in_paragraph), start=1):
                yield _placed_item(question, passage, f"{in_paragraph}, question {number}", language)


def _placed_hub_items(task: str, hub: tuple[str, str], split: str, language: str) -> Iterator[PlacedItem]:
    for number, record in read_hub_records(task, *hub, split):
        place = f"{hub_name(*hub)}, {split}, row {number}"
        # The Hub has one record a question, and its answers' texts in a list of their own.
        texts = member(member(record, "answers", dict, place), "text", list, place)
        question = {**record, "answers": [{"text": text} for text in texts]}
        yield _placed_item(question, text_member(record, "context", place), place, language)


def _placed_item(question: Any, passage: str, place: str, language: str) -> PlacedItem:
    question_id = id_member(question, "id", place)
    place = f"{place} (id {question_id})"
    passage_label, question_label, answer_label = _LABELS.get(language, _LABELS["en"])
    asked = text_member(question, "question", place)
    query = f"{passage_label}: {passage}\n\n{question_label}: {asked}\n\n{answer_label}:"
    start = len(passage_label) + len(": ")
    answers = _gold_answers(question, place)
    return place, Item(question_id, query, references=answers, cuttable=(start, start + len(passage)))


def _gold_answers(question: Any, place: str) -> tuple[str, ...]:
    answers = member(question, "answers", list, place)
    if not answers:
        raise UsageError(f"{place}: 'answers' is empty; at least one gold answer is needed")
    numbered = enumerate(answers, start=1)
    texts = (text_member(answer, "text", f"{place}, answer {number}").strip() for number, answer in numbered)
    return tuple(dict.fromkeys(texts))


XQUAD = Benchmark(
    name="xquad",
    title="XQuAD",
    languages=_XQUAD_LANGUAGES,
    tasks=_xquad_tasks,
    homepage=_XQUAD_HOMEPAGE,
    open_ended=True,
)
MLQA = Benchmark(
    name="mlqa",
    title="MLQA",
    languages=_MLQA_LANGUAGES,
    tasks=_mlqa_tasks,
    homepage=_MLQA_HOMEPAGE,
    open_ended=True,
)
