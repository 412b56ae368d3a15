"""XQuAD and MLQA (a passage and a question in one language) and MKQA (open-domain questions in 26 languages).

XQuAD (Artetxe et al., ACL 2020): SQuAD's questions translated, `xquad.vi.json`, one split. MLQA (Lewis et al., ACL
2020): `test-context-vi-question-vi.json` and `dev-...`. Both are scored as MLQA's official script does.

MKQA (Longpre et al., TACL 2021): `mkqa.jsonl.gz` has one question a line, with translations and gold answers by
language; an answer has a type, a text and aliases. Normalisation is the official script's, and the best over all texts
and aliases counts. Differences to the official figures:

- Questions without a short answer (types `unanswerable` and `long_answer`, a third of the set) are left out and
  counted. Their official gold answer is empty, chosen by a threshold on a probability of "no answer" that generating
  models do not give; with it, a model that never answers scores 32.
- The official gold answer of a yes-no question is "yes" or "no" in every language, because its prediction file has a
  separate field for it. A generated answer is text, so the language's own words are gold answers too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pivotune.data.formats import read_file
from pivotune.errors import UsageError
from pivotune.evaluation.metrics.answers import QUESTION_ANSWERING_METRICS, RuleName, exact_match, f1_score
from pivotune.evaluation.tasks import tables
from pivotune.evaluation.tasks.base import Benchmark, Item, Reader, Task, TaskData
from pivotune.evaluation.tasks.tables import Record, Source, Split

# Passage, question, answer, as the harness's XQuAD tasks word them (its Arabic word for the passage lacks a letter).
_LABELS = {
    "ar": ("سياق", "سؤال", "إجابة"), "de": ("Kontext", "Frage", "Antwort"),
    "el": ("Συμφραζόμενα", "Ερώτηση", "Απάντηση"), "en": ("Context", "Question", "Answer"),
    "es": ("Contexto", "Pregunta", "Respuesta"), "hi": ("प्रसंग", "सवाल", "उत्तर"),
    "ro": ("Context", "Întrebare", "Răspuns"), "ru": ("Контекст", "Вопрос", "Ответ"),
    "th": ("บริบท", "คำถาม", "คำตอบ"), "tr": ("Bağlam", "Soru", "Cevap"),
    "vi": ("Bối cảnh", "Câu hỏi", "Trả lời"), "zh": ("语境", "问题", "回答"),
}  # fmt: skip
# MKQA's languages with their words for yes and no, the commonest first.
_YES_NO = {
    "ar": ("نعم", "لا"), "da": ("ja", "nej"), "de": ("ja", "nein"), "en": ("yes", "no"), "es": ("sí si", "no"),
    "fi": ("kyllä joo", "ei"), "fr": ("oui", "non"), "he": ("כן", "לא"), "hu": ("igen", "nem"),
    "it": ("sì si", "no"), "ja": ("はい", "いいえ"), "km": ("បាទ ចាស", "ទេ"), "ko": ("네 예", "아니요 아니오"),
    "ms": ("ya", "tidak"), "nl": ("ja", "nee"), "no": ("ja", "nei"), "pl": ("tak", "nie"), "pt": ("sim", "não"),
    "ru": ("да", "нет"), "sv": ("ja", "nej"), "th": ("ใช่", "ไม่ใช่ ไม่"), "tr": ("evet", "hayır"),
    "vi": ("có đúng phải vâng", "không"), "zh": ("是 是的 对", "不是 不 否"), "zh_hk": ("是 係 是的 對", "不是 唔係 不 否"),
    "zh_tw": ("是 是的 對", "不是 不 否"),
}  # fmt: skip
# In the order of the Hub's class labels.
_MKQA_TYPES = (
    "entity", "long_answer", "unanswerable", "date", "number", "number_with_unit", "short_phrase", "binary",
)  # fmt: skip


def _answer_benchmark(
    name: str,
    title: str,
    languages: Sequence[str],
    homepage: str,
    rules: RuleName,
    read: Reader,
    open_ended: bool = False,
) -> Benchmark:
    """Return a benchmark with greedy answers, scored by token F1 and exact match."""

    def score(language: str, answer: str, item: Item) -> dict[str, float]:
        scorers = {"f1": f1_score, "exact_match": exact_match}
        return {key: scorer(answer, item.references, language, rules) for key, scorer in scorers.items()}

    def tasks(language: str) -> list[Task]:
        task = Task(f"{name}_{language}", name, language, "answer", QUESTION_ANSWERING_METRICS, partial(read, language))
        # Language identification has no regions: answers to zh_hk should be zh.
        return [replace(task, answer_language=language.partition("_")[0], score=partial(score, language))]

    return Benchmark(name, title, languages, tasks, homepage, open_ended)


def _read_squad(name: str, language: str, source: Source) -> TaskData:
    task, benchmark = f"{name}_{language}", XQUAD if name == "xquad" else MLQA
    tables.check_published(task, source, language, benchmark.languages)
    if name == "xquad":
        # The publisher gives the only split no name; this is the Hub's and the harness's.
        splits, hub = [Split("validation", [f"xquad.{language}.json"])], ("google/xquad", f"xquad.{language}")
    else:
        file = f"context-{language}-question-{language}.json"
        splits = [Split("test", [f"test-{file}"]), Split("validation", [f"dev-{file}"], aliases=["val", "dev"])]
        hub = ("facebook/mlqa", f"mlqa.{language}.{language}")
    opened = tables.open_set(task, source, splits, benchmark.homepage, read=_squad_questions, hub=hub)
    placed = (_squad_item(record, language) for record in opened.records)
    items = tables.by_id(task, opened.origin, ((item.id, place, item) for place, item in placed))
    return TaskData(list(items.values()), opened.split, opened.origin)


def _squad_questions(path: Path) -> Iterator[Record]:
    """Yield the questions of a file, each with its passage as `context`, as on the Hub."""
    for article_number, article in read_file(path):
        in_article = f"{path}, article {article_number}"
        for paragraph_number, paragraph in enumerate(tables.member(article, "paragraphs", list, in_article), start=1):
            in_paragraph = f"{in_article}, paragraph {paragraph_number}"
            context = tables.text_member(paragraph, "context", in_paragraph)
            for number, question in enumerate(tables.member(paragraph, "qas", list, in_paragraph), start=1):
                place = f"{in_paragraph}, question {number}"
                tables.id_member(question, "id", place)  # refuses a question that is no object
                yield Record({**question, "context": context}, number, place)


def _squad_item(record: Record, language: str) -> tuple[str, Item]:
    """Return the question's place, for messages, and its item."""
    question_id = tables.id_member(record.values, "id", record.place)
    place = f"{record.place} (id {question_id})"
    asked, passage = (tables.text_member(record.values, name, place) for name in ("question", "context"))
    answers = record.values.get("answers")
    if isinstance(answers, Mapping) and "text" in answers:
        # The Hub has the texts of all answers in one list.
        answers = [{"text": text} for text in tables.member(answers, "text", list, place)]
    else:
        answers = tables.member(record.values, "answers", list, place)
    if not answers:
        raise UsageError(f"{place}: 'answers' is empty; at least one gold answer is needed")
    numbered = enumerate(answers, start=1)
    texts = [tables.text_member(answer, "text", f"{place}, answer {number}").strip() for number, answer in numbered]
    passage_label, question_label, answer_label = _LABELS.get(language, _LABELS["en"])
    query = f"{passage_label}: {passage}\n\n{question_label}: {asked}\n\n{answer_label}:"
    start = len(passage_label) + len(": ")
    return place, Item(question_id, query, tuple(dict.fromkeys(texts)), cuttable=(start, start + len(passage)))


def _read_mkqa(language: str, source: Source) -> TaskData:
    task = f"mkqa_{language}"
    tables.check_published(task, source, language, MKQA.languages)
    # "train" is the Hub's name for the only split; the publisher's repository has a second, tiny file.
    splits = [Split("train", ["mkqa.jsonl", "*mkqa*.jsonl"])]
    opened = tables.open_set(task, source, splits, MKQA.homepage, read=tables.read_objects, hub=("apple/mkqa", "mkqa"))
    left_out: Counter[str] = Counter()

    def questions() -> Iterator[tuple[str, str, Item]]:
        for record in opened.records:
            item = _mkqa_item(record.values, record.number, record.place, language)
            if item.references:
                yield item.id, record.place, item
            else:
                named = [name for name in item.details["types"] if name in ("unanswerable", "long_answer")]
                left_out[named[0] if named else "no answer text"] += 1

    items = tables.by_id(task, opened.origin, questions())
    return TaskData(list(items.values()), opened.split, opened.origin, dict(left_out))


def _mkqa_item(record: Any, number: int, place: str, language: str) -> Item:
    """Return the question of a record, without references for a question without a short answer."""
    key = "zh_cn" if language == "zh" else language
    item_id = tables.id_member(record, "example_id", place) if "example_id" in record else str(number)
    query = tables.text_member(tables.member(record, "queries", dict, place), key, f"{place}, 'queries'")
    answers = tables.member(tables.member(record, "answers", dict, place), key, list, f"{place}, 'answers'")
    if not answers:
        raise UsageError(f"{place}, 'answers': {key!r} is empty; at least one answer is needed")
    types: list[str] = []
    golds: list[str] = []
    for index, answer in enumerate(answers, start=1):
        where = f"{place}, answer {index} in {key!r}"
        kind = answer.get("type") if isinstance(answer, Mapping) else None
        if type(kind) is not int or not 0 <= kind < len(_MKQA_TYPES):
            name = tables.member(answer, "type", str, where)
            if name not in _MKQA_TYPES:
                raise UsageError(f"{where}: unknown type {name!r}; allowed: {', '.join(_MKQA_TYPES)}")
            kind = _MKQA_TYPES.index(name)
        types.append(_MKQA_TYPES[kind])
        golds += _mkqa_golds(answer, types[-1], where, language)
    # The first answer's likelihood is reported, so the empty one comes last; without any text there is no answer.
    references = tuple(dict.fromkeys(gold for gold in golds if gold))
    if references and "" in golds:
        references = (*references, "")
    return Item(item_id, query, references, details={"types": list(dict.fromkeys(types))})


def _mkqa_golds(answer: Mapping[str, Any], answer_type: str, place: str, language: str) -> list[str]:
    """Return the text, then aliases; for yes and no the language's words first. A null text is the empty answer."""
    aliases = [] if answer.get("aliases") is None else tables.member(answer, "aliases", list, place)
    text = "" if answer.get("text", "") is None else tables.text_member(answer, "text", place, may_be_blank=True)
    named = {f"alias {number}": alias for number, alias in enumerate(aliases, start=1)}
    texts = [text.strip(), *(tables.text_member(named, name, place, may_be_blank=True).strip() for name in named)]
    if answer_type != "binary":
        return texts
    yes, no = _YES_NO.get(language, ("", ""))
    return [*{"yes": yes, "no": no}.get(texts[0].lower(), "").split(), *texts]


_XQUAD_LANGUAGES = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
_XQUAD_HOMEPAGE, _READ_XQUAD = "https://github.com/google-deepmind/xquad", partial(_read_squad, "xquad")
XQUAD = _answer_benchmark("xquad", "XQuAD", _XQUAD_LANGUAGES, _XQUAD_HOMEPAGE, "mlqa", _READ_XQUAD, True)
_MLQA_LANGUAGES = ("ar", "de", "en", "es", "hi", "vi", "zh")
_MLQA_HOMEPAGE = "https://github.com/facebookresearch/MLQA"
MLQA = _answer_benchmark("mlqa", "MLQA", _MLQA_LANGUAGES, _MLQA_HOMEPAGE, "mlqa", partial(_read_squad, "mlqa"), True)
MKQA = _answer_benchmark("mkqa", "MKQA", tuple(_YES_NO), "https://github.com/apple/ml-mkqa", "mkqa", _read_mkqa)
