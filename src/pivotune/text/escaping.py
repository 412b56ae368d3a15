"""Escape text from outside (rows, model folders, configurations, file names) for the terminal, Markdown, LaTeX and CSV."""

from __future__ import annotations

import re

# Characters that move the cursor, change colours or turn the direction of text, except line ends and tabs; and halves of
# surrogate pairs, which no file and no terminal accepts.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Unicode has pictures of the ASCII controls (U+2400 and on).
_PICTURES = {chr(code): chr(0x2400 + code) for code in range(0x20)} | {"\x7f": "\u2421"}
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$",
    "–": "--",
}  # fmt: skip
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|#~$&])")
# First characters of a formula in spreadsheets.
_FORMULA = ("=", "+", "-", "@", "\t")


def printable(text: str) -> str:
    """Replace each control and direction character by a visible one, so that data cannot control the terminal."""
    return _CONTROL.sub(lambda match: _PICTURES.get(match.group(), "\ufffd"), text.replace("\r\n", "\n"))


def printable_json(document: str) -> str:
    """Replace such characters in a JSON document by JSON escapes, which mean the same."""
    # Outside of strings JSON has line ends and blanks only, which are left alone.
    return _CONTROL.sub(lambda match: f"\\u{ord(match.group()):04x}", document)


def one_line(text: str) -> str:
    """Squeeze white space of any kind into single blanks and make control characters visible."""
    return printable(" ".join(text.split()))


def markdown(text: str) -> str:
    """Escape the text of a paragraph or of a table's cell."""
    return _MARKDOWN.sub(r"\\\1", one_line(text))


def latex(text: str) -> str:
    """Escape text outside of mathematics."""
    return "".join(_LATEX.get(character, character) for character in one_line(text))


def csv_text(value: object) -> object:
    """Prefix text that a spreadsheet would compute with an apostrophe; numbers stay numbers."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(_FORMULA) else text
