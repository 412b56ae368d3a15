"""Sources of `data prepare`: parallel corpora and instruction sets, and the columns that make a row.

Corpora are TMX, tables with tabs, and one sentence a line (Moses, FLORES, Tatoeba). Columns are those of published
instruction sets, of a sentence and its English, and of a row's language.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any
from xml.parsers import expat

from pivotune.data.check.language import ENGLISH_WORDS, Detector, Text
from pivotune.data.formats import file_type, is_data_file_name, read_lines, reading
from pivotune.data.rows import EMPTY, ENGLISH_SUFFIX, FORMS, USED_KEYS, RowError
from pivotune.data.sources import Source, open_source
from pivotune.data.text_files import NumberedRecords, open_file
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
# Elements of TMX 1.4b whose content is the markup of the document, not text.
_TMX_CODES = frozenset(("bpt", "ept", "ph", "it", "ut"))
_BYTES_PER_READ = 2**16


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


def open_corpus(
    source: str,
    language: Language,
    column: str | None,
    english_column: str | None,
    *,
    beside_english: bool,
    is_english: bool = False,
) -> tuple[Source, Layout]:
    """Open a data file, a Hub dataset, or a parallel corpus; return the records that `parse_row` reads, and their columns.

    A line is `{"text": sentence}`, a TMX unit `{"translation": {language: sentence}}`, as in parallel sets on the Hub.
    Columns of a table without a header are named `1`, `2`... With `beside_english` a line is one sentence, even with tabs.

    Args:
        column, english_column: columns of sentences that the user named.
        beside_english: the English side comes from another source, or the rows are English alone.
        is_english: this is the English side of rows in `language`.

    Raises:
        UsageError: as `load_rows`; XML that is broken or declares entities.
    """
    path = Path(source).expanduser()
    kind = file_type(path)
    is_corpus = path.is_file() and (kind == ".tsv" or not is_data_file_name(path))
    first = next(read_lines(path), "") if is_corpus and kind != ".tmx" else ""
    # A table of rows has CSV's quotes; others are split at tabs.
    has_quotes = kind == ".tsv" and any(_has_rows(_cells(first), suffix) for suffix in ("", ENGLISH_SUFFIX))
    if not is_corpus or has_quotes:
        corpus = open_source(source, keep_bad=True)
    elif kind == ".tmx":
        corpus = Source(str(path), "unit", _read_tmx(path))
    elif kind == ".tsv" or ("\t" in first and not beside_english):
        corpus = Source(str(path), "line", _read_table(path, language, column))
    else:
        lines = enumerate(read_lines(path), start=1)
        blank = RowError("", "is a blank line")
        corpus = Source(
            str(path), "line", ((number, {"text": line} if line.strip() else blank) for number, line in lines)
        )
    return _adapt(corpus, ENGLISH if is_english else language, column, english_column, beside_english=beside_english)


def _adapt(
    source: Source, language: Language, column: str | None, english_column: str | None, *, beside_english: bool
) -> tuple[Source, Layout]:
    """Return the source with other records, and the columns found in its first ones."""
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


def _has_rows(names: Iterable[str], suffix: str = "") -> bool:
    """Return True if the columns make one of the forms of a row, in any language or in English (`_en`)."""
    names = set(names)
    return any(names.issuperset(f"{key}{suffix}" for key in form) for form in FORMS)


def _find_layout(
    sample: Sequence[Mapping[str, Any]], names: Sequence[str], language: Language, beside_english: bool
) -> Layout:
    if _has_rows(names) or _has_rows(names, ENGLISH_SUFFIX):
        return Layout(has_english=_has_rows(names, ENGLISH_SUFFIX))
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


def _is_header(cells: Sequence[str], language: Language) -> bool:
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


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.rstrip("\r\n").split("\t")]


def _read_table(path: Path, language: Language, column: str | None) -> NumberedRecords:
    lines = enumerate(map(_cells, read_lines(path)), start=1)
    first = next(lines)
    names = first[1]
    if column not in names and not _is_header(names, language):
        names, lines = [str(place) for place, _ in enumerate(names, start=1)], chain([first], lines)
    for number, cells in lines:
        if len(cells) == len(names):
            yield number, dict(zip(names, cells, strict=True))
        else:
            yield number, RowError("", f"has not the {len(names)} columns of line 1", f" but {len(cells)}")


def _read_tmx(path: Path) -> NumberedRecords:
    units = _Units(path)
    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = units.start, units.end
    parser.CharacterDataHandler, parser.EntityDeclHandler = units.add_text, units.refuse_entity
    number = 0
    with reading(path), open_file(path) as file:
        while True:
            piece = file.read(_BYTES_PER_READ)
            try:
                parser.Parse(piece, not piece)
            except UsageError:
                raise
            except (expat.ExpatError, LookupError, ValueError) as error:  # the latter two: an unknown encoding
                raise UsageError(f"{path}, line {parser.CurrentLineNumber}: broken XML: {error}") from error
            for unit in units.done:
                number += 1
                yield number, unit
            units.done.clear()
            if not piece:
                return


class _Units:
    """Collects the translation units of a TMX file: the text of each language's segment, without inline markup."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done: list[dict[str, Any]] = []
        self._texts: dict[str, str] = {}
        self._language, self._segment, self._codes = "", None, 0

    def start(self, name: str, attributes: dict[str, str]) -> None:
        if name == "tu":
            self._texts = {}
        elif name == "tuv":
            self._language = attributes.get("xml:lang") or attributes.get("lang", "")
        elif name == "seg":
            self._segment = []
        self._codes += name in _TMX_CODES

    def end(self, name: str) -> None:
        self._codes -= name in _TMX_CODES
        if name == "seg" and self._segment is not None:
            self._texts.setdefault(self._language, "".join(self._segment))
            self._segment = None
        elif name == "tu":
            self.done.append({"translation": self._texts})

    def add_text(self, text: str) -> None:
        if self._segment is not None and not self._codes:
            self._segment.append(text)

    def refuse_entity(self, name: str, *_: Any) -> None:
        # An entity may name a file, or grow to gigabytes.
        raise UsageError(f"{self._path}: declares the XML entity {name!r}; remove the declaration, TMX needs none")
