"""MMLU in other languages: questions of 57 subjects, four answers each (Hendrycks et al., 2021).

Translated by Okapi, OpenAI and others. The prompt is lm-evaluation-harness's `m_mmlu_{language}`, equal in every
language: the question, the answers after A. to D., and `Answer:`; the likeliest letter counts. Zero-shot, as in the
paper. Subjects alternate, so that the first items (`--limit`) cover many subjects.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from pivotune.data.formats import file_type
from pivotune.evaluation.tasks import tables
from pivotune.evaluation.tasks.base import TaskData, choice_benchmark
from pivotune.evaluation.tasks.harness import OKAPI_LANGUAGES, harness_items
from pivotune.evaluation.tasks.tables import Record, Source, Split

_HOMEPAGE = "https://huggingface.co/datasets/alexandrainst/m_mmlu or https://huggingface.co/datasets/openai/MMMLU"
_HARNESS_LANGUAGES = (*OKAPI_LANGUAGES, "en", "is", "nb")
# Languages of OpenAI's translation alone, with its configuration on the Hub.
_OPENAI_ONLY = {"ja": "JA_JP", "ko": "KO_KR", "sw": "SW_KE", "yo": "YO_NG"}
_LANGUAGES = tuple(sorted((*_HARNESS_LANGUAGES, *_OPENAI_ONLY)))
_OPTIONS = tuple(f"option_{letter}" for letter in "abcd")
_COLUMNS = {
    "instruction": ("question", "instruction"),
    **{name: (name[-1].upper(), name) for name in _OPTIONS},
    "answer": ("answer",),
}
_ANSWERS = {letter: letter for letter in "ABCD"}
_FOLDERS = ("test", "val", "validation", "dev")
_ANY_SUBJECT = "mmlu"


def _patterns(language: str, *parts: str) -> list[str]:
    """Return patterns of a folder with one CSV per subject, of OpenAI's single CSV (test only) and of Okapi's JSON."""
    names = [f"{language}_{part}.{kind}" for part in parts for kind in ("json", "jsonl")]
    patterns = [f"mmlu_{language}/{part}/*.csv" for part in parts]
    if language == "en":
        patterns += [f"{folder}/{part}/*_{part}.csv" for folder in ("mmlu", "data") for part in parts]
    if "test" in parts:
        patterns += [f"mmlu_{language.upper()}-*.csv", *(["mmlu.csv"] if language == "en" else [])]
    return [*patterns, *(f"*mmlu*/{name}" for name in names), *(f"*mmlu_{name}" for name in names), *names]


def _read(language: str, source: Source) -> TaskData:
    task = f"mmlu_{language}"
    hub = ("openai/MMMLU", _OPENAI_ONLY[language]) if language in _OPENAI_ONLY else ("alexandrainst/m_mmlu", language)
    tables.check_published(task, source, language, _LANGUAGES)
    test_files = f"{task}/test/*.csv or mmlu_{language.upper()}-*.csv or {language}_test.json"
    splits = [
        Split("test", _patterns(language, "test"), files=test_files),
        Split("validation", _patterns(language, "val", "validation"), ("val",), "val", f"{task}/val/*.csv"),
        # Five questions of each subject, for examples; the Hub calls them train.
        Split("dev", _patterns(language, "dev"), (), "train", f"{task}/dev/*.csv"),
    ]
    split, files = tables.choose_split(task, source, splits, _HOMEPAGE)
    if files:
        records = _file_records(task, files)
    else:
        hub_records = tables.read_hub(task, hub, split.hub_name, _COLUMNS)
        records = ((_subject(record, _ANY_SUBJECT), record) for record in hub_records)
    origin = tables.origin_of(source, files) or [tables.hub_name(*hub)]

    def questions() -> Iterator[tuple[str, str, dict[str, str]]]:
        numbers: Counter[str] = Counter()
        for subject, record in records:
            numbers[subject] += 1
            texts = {name: record.text(name) for name in ("instruction", *_OPTIONS)}
            yield f"{subject}/{numbers[subject]}", record.place, {**texts, "answer": record.label("answer", _ANSWERS)}

    docs = tables.by_id(task, origin, questions())
    details = {identifier: {"subject": identifier.rpartition("/")[0]} for identifier in docs}
    # The first question of every subject, then the second ones, and so on.
    place = {subject: index for index, subject in enumerate(dict.fromkeys(d["subject"] for d in details.values()))}
    ids = sorted(docs, key=lambda name: (int(name.rpartition("/")[2]), place[details[name]["subject"]]))
    harness_name = f"m_mmlu_{language}" if language in _HARNESS_LANGUAGES else "m_mmlu_en"
    items = harness_items(harness_name, {identifier: docs[identifier] for identifier in ids}, details)
    return TaskData(items, split.name, origin)


def _file_records(task: str, files: Sequence[Path]) -> Iterator[tuple[str, Record]]:
    """Yield (subject, record) of a folder's files one after the other, or of a single file."""
    by_subject: defaultdict[str, list[Path]] = defaultdict(list)
    for path in files:
        # Any other file holds all subjects (OpenAI's lie in `test/` too).
        has_one = path.parent.name in _FOLDERS and file_type(path) == ".csv" and not path.name.startswith("mmlu_")
        subject = re.sub(rf"_({'|'.join(_FOLDERS)})$", "", path.name.split(".")[0]) if has_one else _ANY_SUBJECT
        by_subject[subject].append(path)
    for subject, paths in by_subject.items():
        path = tables.only_file(task, paths)
        read = partial(tables.read_table, delimiter=",") if file_type(path) == ".csv" else tables.read_objects
        yield from ((_subject(record, subject), record) for record in read(path, _COLUMNS))


def _subject(record: Record, default: str) -> str:
    """Return the record's subject, or the first part of an id such as `anatomy/test/3`."""
    named = record.values.get("Subject") or record.values.get("subject")
    in_id, slash, _ = str(record.values.get("id", "")).partition("/")
    return str(named or (in_id if slash else "") or default)


MMLU = choice_benchmark("mmlu", "MMLU", _LANGUAGES, _HOMEPAGE, _read, open_ended=True)
