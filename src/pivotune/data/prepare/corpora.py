"""Parallel corpora as numbered records: TMX, tables with tabs, and one sentence a line (Moses, FLORES, Tatoeba)."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any
from xml.parsers import expat

from pivotune.data.formats import file_type, is_data_file_name, read_lines, reading
from pivotune.data.prepare.columns import Layout, adapt, has_rows, is_header
from pivotune.data.rows import ENGLISH_SUFFIX, RowError
from pivotune.data.sources import Source, open_source
from pivotune.data.text_files import NumberedRecords, open_file
from pivotune.errors import UsageError
from pivotune.text.languages import Language

# Elements of TMX 1.4b whose content is the markup of the document, not text.
_TMX_CODES = frozenset(("bpt", "ept", "ph", "it", "ut"))
_BYTES_PER_READ = 2**16


def open_corpus(
    source: str, language: Language, column: str | None, english_column: str | None, *, beside_english: bool
) -> tuple[Source, Layout]:
    """Open a data file, a Hub dataset, or a parallel corpus; arguments and result as `adapt`.

    A line is `{"text": sentence}`, a TMX unit `{"translation": {language: sentence}}`, as in parallel sets on the Hub.
    Columns of a table without a header are named `1`, `2`... With `beside_english` a line is one sentence, even with tabs.

    Raises:
        UsageError: as `load_rows`; XML that is broken or declares entities.
    """
    path = Path(source).expanduser()
    kind = file_type(path)
    is_corpus = path.is_file() and (kind == ".tsv" or not is_data_file_name(path))
    first = next(read_lines(path), "") if is_corpus and kind != ".tmx" else ""
    # A table of rows has CSV's quotes; others are split at tabs.
    has_quotes = kind == ".tsv" and any(has_rows(_cells(first), suffix) for suffix in ("", ENGLISH_SUFFIX))
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
    return adapt(corpus, language, column, english_column, beside_english=beside_english)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.rstrip("\r\n").split("\t")]


def _read_table(path: Path, language: Language, column: str | None) -> NumberedRecords:
    lines = enumerate(map(_cells, read_lines(path)), start=1)
    first = next(lines)
    names = first[1]
    if column not in names and not is_header(names, language):
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
