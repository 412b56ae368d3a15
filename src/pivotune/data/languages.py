"""Find the language of every row of a run: the row's own key `language`, else that of its source, else `data.language`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pivotune.config.settings import EncodingConfig
from pivotune.data.formats import numbered_by
from pivotune.data.lazy import Mapped
from pivotune.data.rows import LANGUAGE_KEY
from pivotune.data.sources import Rows
from pivotune.errors import UsageError
from pivotune.text.languages import check_language, find_language, is_english


class RowLanguages(NamedTuple):
    """The languages of the rows of several sources.

    Attributes:
        parts: the sources. `Row.language` is the row's code where the rows have several languages, else ''.
        codes: where the rows have several languages, those of each source, texts (rows,); else nothing.
        language: `data.language`, in which a list names the languages that were found.
        notes: lines about keys and settings that are not used.
    """

    parts: list[Rows]
    codes: list[np.ndarray]
    language: str | list[str] | None
    notes: list[str]


def assign_languages(parts: Sequence[Rows], of_sources: Sequence[str | None], data: EncodingConfig) -> RowLanguages:
    """Assign a language to every row.

    Files may use the key `language` for something else, such as programming languages. It is therefore ignored, with a
    note, where a row's value is no known language, unless the settings ask for several languages.

    Args:
        of_sources: for each source to train on the language of rows that name none; held-out sources follow.

    Raises:
        UsageError: the settings ask for several languages, and a row has none, or one that is not allowed, or no row is in
            one of them.
    """
    asked = isinstance(data.language, list) or any(of_sources) or data.language_temperature != 1
    # Where all sources are of one language, so is a held-out file.
    fallback = next(iter(data.languages or (of_sources if len(set(of_sources)) == 1 else ())), None) or ""
    defaults = [of_source or fallback for of_source, _ in zip_longest(of_sources, parts)]
    problem = ""
    if asked or any(any(part.languages) for part in parts):
        problems = (_problem(part, default, data, asked) for part, default in zip(parts, defaults, strict=True))
        problem = next(filter(None, problems), "")
    if problem and asked:
        raise UsageError(problem)
    names = {name for part in parts for name in part.languages}
    if not asked and data.languages and len(names) == 1 and not names <= {"", *data.languages}:
        problem = f"every row names {names.pop()}, and data.language is {data.language}"
    code_of = [
        {name: default if problem else name or default for name in part.languages}
        for part, default in zip(parts, defaults, strict=True)
    ]
    if of_sources:
        _check_trained({code for codes in code_of[: len(of_sources)] for code in codes.values()}, data)
    known = dict.fromkeys(code for codes in code_of for code in codes.values() if code)
    found = [code for code in dict.fromkeys([*data.languages, *known]) if code in known]
    notes = [f"the key `{LANGUAGE_KEY}` is not used: {problem}"] if problem else []
    if found and isinstance(data.language, str) and data.language not in found:
        notes.append(f"data.language: {data.language} is not used: every row names another language")
    assigned, of_rows = [], []
    for part, codes in zip(parts, code_of, strict=True):
        if len(found) > 1:
            of_rows.append(np.array([codes[name] for name in part.languages], dtype=object)[part.language_of])
        if len(found) > 1 or any(part.languages):
            kept = codes if len(found) > 1 else {}
            # `kept` as a default: each part has its own.
            named = Mapped(part.rows, lambda _, row, kept=kept: replace(row, language=kept.get(row.language, "")))
            part = replace(part, rows=named)
        assigned.append(part)
    return RowLanguages(assigned, of_rows, data.language if found in ([], data.languages) else found, notes)


def _problem(part: Rows, default: str, data: EncodingConfig, asked: bool) -> str | None:
    """Return the first row that has no language, or one that is not allowed, with the reason; None without one."""
    for place, name in enumerate(part.languages):
        try:
            if not (name or default):
                raise UsageError("names no language; give it a key `language`, or set data.language")
            if name:
                # Three letters may be any language; unasked, they may be anything.
                check_language(name, LANGUAGE_KEY) if asked else find_language(name)
            if is_english(name or default):
                raise UsageError(f"{LANGUAGE_KEY}: {name or default} is English, the other side of every row")
            if isinstance(data.language, list) and (name or default) not in data.language:
                allowed = f"allowed: {', '.join(data.language)} (data.language)"
                raise UsageError(f"{LANGUAGE_KEY}: {name or default} found; {allowed}")
        except UsageError as error:
            row = part[int(np.argmax(part.language_of == place))]
            return f"{part.source}, {numbered_by(Path(part.source))} {row.number}: {error}"
    return None


def _check_trained(trained: set[str], data: EncodingConfig) -> None:
    """Refuse a language of `data.language` without rows, and a temperature for a single language."""
    if missing := [code for code in data.languages if isinstance(data.language, list) and code not in trained]:
        raise UsageError(
            f"data.language: no row to train on is in {missing[0]}; name it in the rows (`language`) or their source"
        )
    if data.language_temperature != 1 and len(trained) < 2:
        raise UsageError(
            f"data.language_temperature: {data.language_temperature:g} balances several languages, and all rows to train "
            f"on are in {next(iter(trained))}; allowed: 1"
        )
