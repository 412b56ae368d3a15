"""Recall of `pivotune data check` on planted damage, and the share of real rows that it flags.

    python -m benchmarks.data_check vi=vi.jsonl.gz zh=zh.jsonl.gz

Of the first `--rows` rows of a file without a defect, `--damaged` rows spread at random are damaged in one way, and the
whole file is checked. Recall is the share of these rows that the check flags as defects. "As they are" is the share of
defects in the file's own rows, in files of 300 rows each. The table is Markdown.
"""

from __future__ import annotations

import argparse
import html
import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks.common import positive, run_program
from pivotune.data.check import DataCheck, check_rows
from pivotune.data.rows import Row
from pivotune.data.sources import load_rows
from pivotune.errors import UsageError

CLEAN_FILE = 300
Damage = Callable[[Row, random.Random], Row | None]


def in_answer(change: Callable[[str, random.Random], str]) -> Damage:
    """Damage the answer; rows whose answer stays as it is are left out."""

    def damage(row: Row, generator: random.Random) -> Row | None:
        changed = change(row.completion, generator)
        return replace(row, completion=changed) if changed != row.completion else None

    return damage


def in_long_answer(change: Callable[[str, random.Random], str], characters: int = 60) -> Damage:
    """Damage answers whose English has at least so many characters."""
    return lambda row, generator: in_answer(change)(row, generator) if len(row.completion_en) >= characters else None


def inserted(*pieces: str, times: int = 1) -> Callable[[str, random.Random], str]:
    """Insert one of the pieces at random places."""

    def insert(text: str, generator: random.Random) -> str:
        for _ in range(times):
            place = generator.randint(1, max(len(text) - 1, 1))
            text = text[:place] + generator.choice(pieces) + text[place:]
        return text

    return insert


def escaped_both(row: Row, generator: random.Random) -> Row | None:
    """Escape quotes, apostrophes and signs on both sides, as a crawler does."""
    target, english = (html.escape(text) for text in (row.completion, row.completion_en))
    return replace(row, completion=target, completion_en=english) if "&" in target and "&" in english else None


def cut_at_sentence(text: str, generator: random.Random) -> str:
    ends = [match.end() for match in re.finditer(r"[.!?。！？](?:\s|(?=\S))", text)][:-1]
    ends = [end for end in ends if end <= 0.75 * len(text)]
    return text[: generator.choice(ends)].rstrip() if ends else text


def misread(codec: str) -> Callable[[str, random.Random], str]:
    return lambda text, _: text.encode().decode(codec, "replace" if codec != "latin-1" else "strict")


def half_left(text: str, english: str) -> str:
    """The first half of the sentences, then the rest of the English."""
    own, others = (re.split(r"(?<=[.!?。！？])\s*", side) for side in (text, english))
    return " ".join([*own[: len(own) // 2], *others[len(others) // 2 :]]) if min(len(own), len(others)) >= 4 else ""


def left_in_part(row: Row, _: random.Random) -> Row | None:
    mixed = half_left(row.completion, row.completion_en)
    return replace(row, completion=mixed) if mixed else None


def input_of(value: str) -> Damage:
    """An input without content on both sides: as the last line of the prompt, or in a field of its own."""

    def damage(row: Row, generator: random.Random) -> Row:
        if generator.random() < 0.5:
            return replace(row, input=value, input_en=value)
        return replace(row, prompt=f"{row.prompt}\n{value}", prompt_en=f"{row.prompt_en}\n{value}")

    return damage


def another_digit(text: str, generator: random.Random) -> str:
    """Change a digit of a number of two digits or more."""
    places = [place for match in re.finditer(r"\d{2,}", text) for place in range(*match.span())]
    if not places:
        return text
    place = generator.choice(places)
    return f"{text[:place]}{(int(text[place]) + generator.randint(1, 9)) % 10}{text[place + 1 :]}"


DAMAGE: dict[str, Damage] = {
    "HTML paragraph around the answer": in_answer(lambda text, _: f"<p>{text}</p>"),
    "HTML tags inside": in_answer(inserted("<br>", "<b>", "</div>", "<br />", '<span class="x">')),
    "HTML escapes": in_answer(inserted("&quot;", "&nbsp;", "&#39;", "&amp;", "&lt;")),
    "HTML escapes on both sides": escaped_both,
    "UTF-8 read as Latin-1": in_answer(misread("latin-1")),
    "UTF-8 read as Windows-1252": in_answer(misread("cp1252")),
    "UTF-8 read as Windows-1251": in_answer(misread("cp1251")),
    "UTF-8 read as GBK": in_answer(misread("gbk")),
    "characters replaced by U+FFFD": in_answer(inserted("\ufffd")),
    "letters replaced by question marks": in_answer(lambda text, _: text.encode("ascii", "replace").decode()),
    "zero-width characters": in_answer(inserted("\u200b", "\u200c", "\u200d", "\u2060", "\ufeff")),
    "bidi controls": in_answer(inserted("\u200e", "\u200f", "\u202a", "\u202e", "\u2066")),
    "control characters": in_answer(inserted("\x00", "\x08", "\x1b", "\x85", "\x0b")),
    "soft hyphens": in_answer(inserted("\u00ad")),
    "NFD in a file of NFC": in_answer(lambda text, _: unicodedata.normalize("NFD", text)),
    "control token of a chat model": in_answer(
        inserted("<|end|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "</s>", "[/INST]", "<|endoftext|>")
    ),
    "subword marks": in_long_answer(lambda text, _: "▁" + text.replace(" ", " ▁") + " ▁."),
    "`<noinput>` as input": input_of("<noinput>"),
    "`nan` as input": input_of("nan"),
    "`None` as answer": lambda row, generator: replace(
        row, completion=generator.choice(("None", "nan", "null", "N/A"))
    ),
    "`[object Object]` inside": in_answer(inserted("[object Object]")),
    r"`\n` spelled out": in_answer(lambda text, _: text.replace("\n", "\\n")),
    r"`\u` escapes": in_answer(lambda text, _: text.encode("ascii", "backslashreplace").decode()),
    "full-width letters and digits": in_answer(
        lambda text, _: "".join(chr(ord(c) + 0xFEE0) if c.isascii() and c.isalpha() else c for c in text)
    ),
    "answer written twice": in_answer(lambda text, _: f"{text} {text}" if len(text) >= 12 else text),
    "a loop at the end": in_long_answer(lambda text, _: text + text[-12:] * 12),
    "cut anywhere, 20 % to 85 % kept": in_long_answer(
        lambda text, generator: text[: int(len(text) * generator.uniform(0.2, 0.85))].rstrip()
    ),
    "cut after a sentence, at most 75 % kept": in_long_answer(cut_at_sentence),
    "a digit changed": in_answer(another_digit),
    "answer left in English (sentences; tasks that do not name a language)": lambda row, _: (
        replace(row, completion=row.completion_en)
        if re.search(r"\w+(?:\W+\w+){5}[.!?]$", row.completion_en)
        and not re.search("english|translat", row.prompt_en, re.I)
        else None
    ),
    "half of the answer left in English": left_in_part,
    "spaces before punctuation, or between letters": in_long_answer(
        lambda text, _: re.sub(r"(?<=[\u3400-\u9fff])(?=[\u3400-\u9fff])", " ", re.sub(r"(?<=\w)(?=[.,!?])", " ", text))
    ),
    "line breaks lost": lambda row, _: (
        replace(row, completion=row.completion.replace("\n", " ")) if row.completion_en.count("\n") >= 3 else None
    ),
}


def defects(check: DataCheck) -> set[int | str]:
    """Return the numbers of all rows with a defect."""
    return {number for problem in check.problems if problem.defect for number in problem.numbers}


def recall(rows: Sequence[Row], damage: Damage, count: int, language: str) -> tuple[int, int]:
    """Damage `count` rows and check all; return the damaged rows that were found, and their number."""
    generator = random.Random(0)
    places = generator.sample(range(len(rows)), len(rows))
    damaged: dict[int, Row] = {}
    for place in places:
        if len(damaged) == count:
            break
        if row := damage(rows[place], generator):
            damaged[place] = row
    check = check_rows([damaged.get(place, row) for place, row in enumerate(rows)], language=language)
    return len(defects(check) & {row.number for row in damaged.values()}), len(damaged)


def flagged_as_they_are(rows: Sequence[Row], language: str) -> tuple[int, int]:
    """Check the rows in files of `CLEAN_FILE` rows; return the rows with a defect, and all rows."""
    files = [rows[start : start + CLEAN_FILE] for start in range(0, len(rows) - CLEAN_FILE + 1, CLEAN_FILE)]
    return sum(check_rows(file, language=language).flagged for file in files), len(files) * CLEAN_FILE


def main(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="LANGUAGE=FILE")
    parser.add_argument("--rows", type=positive, default=2000)
    parser.add_argument("--damaged", type=positive, default=200)
    parser.add_argument("--only", default="", help="only kinds with this word in their name")
    options = parser.parse_args(arguments)
    languages, columns = [], []
    for argument in options.files:
        language, found, file = argument.partition("=")
        if not found:
            raise UsageError(f"{argument}: found; allowed: LANGUAGE=FILE, such as vi=vi.jsonl.gz")
        rows = list(load_rows(file, on_bad_row="skip", limit=options.rows))
        flagged, total = flagged_as_they_are(rows, language)
        own = defects(check_rows(rows, language=language))
        clean = [row for row in rows if row.number not in own]
        column = [f"{flagged / max(total, 1):.1%} of {total:,}"]
        for name, damage in DAMAGE.items():
            hits, count = recall(clean, damage, options.damaged, language) if options.only in name else (0, 0)
            column.append(f"{hits / count:.0%} of {count}" if count else "-")
        languages.append(language)
        columns.append(column)
    print(f"| | {' | '.join(languages)} |\n|---|{'---|' * len(languages)}")
    for name, *cells in zip(("rows as they are, with a defect", *DAMAGE), *columns, strict=True):
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run_program(main)
