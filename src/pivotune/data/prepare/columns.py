"""Columns of a source: those of published instruction sets, of a sentence and its English, and of a row's language."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from pivotune.data.check.language import ENGLISH_WORDS, Detector, Text
from pivotune.data.rows import EMPTY, ENGLISH_SUFFIX, FORMS, USED_KEYS, RowError
from pivotune.data.sources import Source
from pivotune.data.text_files import NumberedRecords
from pivotune.errors import UsageError
from pivotune.text.json_text import shown
from pivotune.text.languages import Language, find_language, known_language

ENGLISH = find_language("en")
# Columns of published sets -> keys of a row, after the forms that `parse_row` knows (Stanford Alpaca, Bactrian-X, x-LLM).
# The first set counts whose columns are all there.
INSTRUCTION_SETS: Sequence[Mapping[str, str]] = (
    {"inputs": "prompt", "targets": "completion"},  # Aya, xP3, Flan
    {"instruction": "instruction", "context": "input", "response": "output"},  # Dolly
    {"system_prompt": "system", "question": "prompt", "response": "completion"},  # OpenOrca
    {"instruction": "prompt", "response": "completion"},
    {"prompt": "prompt", "response": "completion"},
    {"query": "prompt", "response": "completion"},
    {"question": "prompt", "answer": "completion"},
    {"input": "prompt", "output": "completion"},  # MURI-IT
)
_SENTENCE = ("text", "sentence")
_HEADER = frozenset(
    (*_SENTENCE, "source", "target", "src", "tgt", "sentence1", "sentence2", "source_text", "target_text")
)
_LANGUAGE = ("language_code", "language", "lang")
_SAMPLE = 200
# Share of the commonest English words: about 40 % in English prose, under 3 % in other languages.
_ENGLISH_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns that are read.

    Attributes:
        renamed: column -> key of a row, for rows under other names.
        sentence, english: columns of a sentence in the source's language and in English, for a parallel corpus.
        has_english: some row has an English side.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    sentence: str | None = None
    english: str | None = None
    has_english: bool = False

    def record(self, record: Any, language: Language) -> Any:
        """Return a record as `parse_row` reads it; a sentence is prompt and completion at once."""
        if not isinstance(record, Mapping):
            return record
        values = dict(record)
        for name in _LANGUAGE:
            found = known_language(value) if isinstance(value := values.get(name), str) else None
            if found is not None:
                if found != language:
                    return RowError(name, f"is another language than {language.code}")
                del values[name]
        if self.sentence is None:
            return {self.renamed.get(name, name): value for name, value in values.items()}
        values |= _translations(values)
        values.pop("translation", None)
        texts = {}
        for name, suffix in ((self.sentence, ""), (self.english, ENGLISH_SUFFIX)):
            if name is not None:
                text = values.pop(name, None)
                if not isinstance(text, str) or not text.strip():
                    return RowError(name, EMPTY)
                texts |= dict.fromkeys((f"prompt{suffix}", f"completion{suffix}"), text.strip())
        others = {name: value for name, value in values.items() if name == "id" or name not in USED_KEYS}
        return others | texts


def adapt(
    source: Source, language: Language, column: str | None, english_column: str | None, *, beside_english: bool
) -> tuple[Source, Layout]:
    """Return the source with the records that `parse_row` reads, and the columns found in its first records.

    Args:
        column, english_column: columns of sentences that the user named.
        beside_english: the English side comes from another source, or the rows are English alone.
    """
    records = iter(source.records)
    first = list(islice(records, _SAMPLE))
    sample = [{**record, **_translations(record)} for _, record in first if isinstance(record, Mapping)]
    names = list(dict.fromkeys(str(name) for record in sample for name, value in record.items() if value is not None))
    if column is not None:
        for name in filter(None, (column, english_column)):
            if name not in names:
                has = ", ".join(shown(name) for name in names)
                raise UsageError(f"--columns: {source.name} has no column {shown(name)}; it has {has}")
        layout = Layout(sentence=column, english=english_column, has_english=english_column is not None)
    else:
        layout = _find_layout(sample, names, language, beside_english)

    def adapted() -> NumberedRecords:
        for number, record in chain(first, records):
            yield number, layout.record(record, language)

    return Source(source.name, source.unit, adapted()), layout


def _translations(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the texts by language of a parallel set on the Hub, or of a TMX unit."""
    value = record.get("translation")
    return value if isinstance(value, Mapping) else {}


def has_rows(names: Iterable[str], suffix: str = "") -> bool:
    """Return True if the columns make one of the forms of a row, in any language or in English (`_en`)."""
    names = set(names)
    return any(names.issuperset(f"{key}{suffix}" for key in form) for form in FORMS)


def _find_layout(
    sample: Sequence[Mapping[str, Any]], names: Sequence[str], language: Language, beside_english: bool
) -> Layout:
    if has_rows(names) or has_rows(names, ENGLISH_SUFFIX):
        return Layout(has_english=has_rows(names, ENGLISH_SUFFIX))
    for known in INSTRUCTION_SETS:
        if known.keys() <= set(names):
            twins = {f"{name}{ENGLISH_SUFFIX}": f"{key}{ENGLISH_SUFFIX}" for name, key in known.items()}
            return Layout({**known, **twins}, has_english=not twins.keys().isdisjoint(names))
    target, english = (_column_of(names, wanted) for wanted in (language, ENGLISH))
    single = next((name for name in _SENTENCE if name in names), None)
    if beside_english:
        return Layout(sentence=target or single)
    if not (target and english):
        target, english = _columns_by_content(sample, names, language)
    return Layout(sentence=target or single, english=english, has_english=english is not None)


def is_header(cells: Sequence[str], language: Language) -> bool:
    """Return True if a table's first line names its columns: the language and English, or words such as `source`."""
    named = all(_column_of(cells, wanted) for wanted in (language, ENGLISH))
    return named or not _HEADER.isdisjoint(map(str.casefold, cells))


def _column_of(names: Sequence[str], language: Language) -> str | None:
    """Return the column that names the language: `vi`, `Vietnamese`, `sentence_vie_Latn`, `vi_text`."""
    parts = {name: re.split(r"[^A-Za-z0-9]+", name) for name in names}
    ways = (
        lambda name: name,
        lambda name: "_".join(parts[name][-2:]),
        lambda name: parts[name][-1],
        lambda name: parts[name][0],
    )
    return next((name for way in ways for name in names if known_language(way(name)) == language), None)


def _columns_by_content(
    sample: Sequence[Mapping[str, Any]], names: Sequence[str], language: Language
) -> tuple[str | None, str | None]:
    """Return the columns of the language and of English by their words: (None, None) where they are not told apart."""
    detector, shares, is_target = Detector(language.code), {}, {}
    for name in names:
        text = Text("\n".join(value for record in sample if isinstance(value := record.get(name), str)))
        if text.words:
            shares[name] = sum(word in ENGLISH_WORDS for word in text.words) / len(text.words)
            is_target[name] = bool(detector.tells(text))
    if not shares:
        return None, None
    english = max(shares, key=shares.__getitem__)
    others = [name for name in shares if name != english and shares[name] < shares[english] / 2]
    if shares[english] < _ENGLISH_SHARE or not others:
        return None, None
    return min(others, key=lambda name: (not is_target[name], shares[name])), english
