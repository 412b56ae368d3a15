"""Split a text into units for a translator and join the translations, with code, links and line breaks unchanged.

Code blocks, line breaks, list markers and lines without letters never reach the translator. Links, inline code and
placeholders do, because a whole sentence is translated better. If its translation does not hold exactly the same ones, the
text between them is translated piece by piece.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

Translate = Callable[[Sequence[str]], Sequence[str]]

# Lines that are code without a fence. English lines rarely begin with these words in lower case or end like this.
_CODE_LINE = (
    r"[ \t]*(?:(?:def|class) \w+[^\n]*:|(?:for|while|if|elif|else|try|except|with)\b[^\n]*:|from [\w.]+ import [^\n]+"
    r"|import [\w.]+(?: as \w+)?|\#include[^\n]*|(?=[^\n]*[=(])[^\n]*;|[^\n]*\{|[}\])]+[;,]?|[\w.]+\([^\n]*\)"
    r"|\w[\w.\[\]]* ?[-+*/]?= ?[\w.]*[(\[{\"'\d][^\n]*|<[^<>\n]+>(?:[^\n]*</\w+>)?"
    r"|(?:SELECT|INSERT INTO|UPDATE|DELETE FROM|CREATE|FROM|WHERE|VALUES|(?:GROUP|ORDER) BY)\b[^\n]*)[ \t\r]*$"
)
# A fenced block, to the end of the text if it is left open; or lines of code, with indented and blank ones after them.
_CODE = re.compile(
    r"^[ \t]*(?P<fence>```|~~~)[^`\n]*$(?s:.*?^[ \t]*(?P=fence)[`~]*[ \t\r]*$|.*)"
    rf"|^{_CODE_LINE}(?:\n(?:{_CODE_LINE}|[ \t]{{2,}}[^\n]*|[ \t]*(?:\#|//)[^\n]*|[ \t\r]*$))*",
    re.MULTILINE,
)
_BREAKS = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")
# "1. ", "1.Eat", "(a) ", "iv) ", "- ", "* [ ] ", "## ", "> ", "•".
_MARKER = re.compile(
    r"\s*(?:(?:[-*+–—>#]+|\(?(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,5})[.)]|\[[ xX]\])(?=\s)\s*"
    r"|[•·▪●◦]\s*|\d{1,3}[.)](?=[^\W\d])){0,3}"
)
_PROTECTED = re.compile(
    r"(?<!`)(?P<ticks>`+)(?!`)[^\n]+?(?<!`)(?P=ticks)(?!`)"  # inline code
    r"|(?:https?://|ftp://|www\.)[^\s<>\"']*[^\s<>\"'.,;:!?)\]}]"
    r"|(?<![\w.+-])[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)+"
    r"|\{+[\w .:-]{1,60}\}+|<[/!|]?[A-Za-z][^<>\n]{0,80}>|\[[A-Z][A-Z0-9_ ]*\]"  # {name}, <name>, [NAME]
    r"|%(?:\(\w+\))?[-+0#]?\d*(?:\.\d+)?[sdifgxr](?!\w)"  # %s, %(name)s, %.2f
    r"|\S{200,}"  # encoded data
)


class Piece(NamedTuple):
    """A part of a text, and True if it is to be translated."""

    text: str
    translate: bool


def split_text(text: str) -> list[Piece]:
    """Split a text into lines without their markers and everything else; the pieces together are the text."""
    pieces: list[Piece] = []
    for block, is_code in _parts(_CODE, text):
        for line, is_break in [(block, True)] if is_code else _parts(_BREAKS, block):
            start = len(line) if is_break else _MARKER.match(line).end()  # pyright: ignore[reportOptionalMemberAccess]
            pieces += (Piece(line[:start], False), *_core(line[start:]))
    return [piece for piece in pieces if piece.text]


def split_protected(text: str) -> list[Piece]:
    """Split a line into its protected spans and the text between them."""
    return [
        piece
        for part, is_span in _parts(_PROTECTED, text)
        for piece in ([Piece(part, False)] if is_span else _core(part))
    ]


def protected_spans(text: str) -> list[str]:
    """Return inline code, links, addresses and placeholders, sorted: their order may change in a translation."""
    return sorted(match.group() for match in _PROTECTED.finditer(text))


def translate_texts(texts: Iterable[str], translate: Translate, known: dict[str, str]) -> list[str]:
    """Translate texts, each different line once.

    A translation that is blank, or that adds a protected span, is replaced by its English text.

    Args:
        translate: returns one translation for each of the texts.
        known: translations by line, which are reused and added to.
    """
    split = [split_text(text) for text in texts]
    lines = _new(split, known)
    answers = {line: _one_line(answer) or line for line, answer in zip(lines, translate(lines), strict=True)}
    broken = {
        line: split_protected(line)
        for line, answer in answers.items()
        if protected_spans(answer) != protected_spans(line)
    }
    known |= {line: answer for line, answer in answers.items() if line not in broken}
    parts = [part for part in _new(broken.values(), known) if part not in broken]
    for part, answer in zip(parts, translate(parts), strict=True):
        answer = _one_line(answer)
        known[part] = answer if answer and not protected_spans(answer) else part
    known |= {line: _joined(pieces, known) for line, pieces in broken.items()}
    return [_joined(pieces, known) for pieces in split]


def _joined(pieces: Iterable[Piece], known: dict[str, str]) -> str:
    return "".join(known.get(piece.text, piece.text) if piece.translate else piece.text for piece in pieces)


def _new(split: Iterable[Iterable[Piece]], known: dict[str, str]) -> list[str]:
    """Return the different texts that are to be translated and not known."""
    return list(dict.fromkeys(p.text for pieces in split for p in pieces if p.translate and p.text not in known))


def _one_line(text: str) -> str:
    """Return a translation without line breaks, outer spaces and halves of surrogate pairs."""
    return _BREAKS.sub(" ", text.encode(errors="replace").decode()).strip()


def _core(text: str) -> tuple[Piece, Piece, Piece]:
    """Split off the white space around a text; a text without letters outside its protected spans is not translated."""
    core = text.strip()
    start = text.find(core)
    has_letters = any(map(str.isalpha, _PROTECTED.sub("", core)))
    return Piece(text[:start], False), Piece(core, has_letters), Piece(text[start + len(core) :], False)


def _parts(pattern: re.Pattern[str], text: str) -> Iterator[tuple[str, bool]]:
    """Yield in turn the text between the matches and the matches (True)."""
    end = 0
    for match in pattern.finditer(text):
        yield text[end : match.start()], False
        yield match.group(), True
        end = match.end()
    yield text[end:], False
