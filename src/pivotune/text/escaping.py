"""Text from outside (rows, model folders, configurations, file names) made harmless where it is shown or written."""

from __future__ import annotations

import re

# Everything that moves the cursor, changes colours or turns the direction of text, but not line ends and tabs; and halves
# of surrogate pairs, which no file and no terminal takes.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$",
    "–": "--",
}  # fmt: skip
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|#~$&])")
# What spreadsheets take for the beginning of a formula.
_FORMULA = ("=", "+", "-", "@", "\t")


def printable(text: str) -> str:
    """The text with every control and direction character made visible, one for one: data must not drive the terminal."""
    return _CONTROL.sub(lambda match: _visible(match.group()), text.replace("\r\n", "\n"))


def printable_json(document: str) -> str:
    """A JSON document in which such characters are written as JSON's own escapes; its meaning stays the same."""
    # Outside of strings JSON has line ends and blanks only, and these are not touched.
    return _CONTROL.sub(lambda match: f"\\u{ord(match.group()):04x}", document)


def one_line(text: str) -> str:
    """White space of any kind as one blank, control characters visible."""
    return printable(" ".join(text.split()))


def markdown(text: str) -> str:
    """Text of a paragraph or a table's cell."""
    return _MARKDOWN.sub(r"\\\1", one_line(text))


def latex(text: str) -> str:
    """Text outside of mathematics."""
    return "".join(_LATEX.get(character, character) for character in one_line(text))


def csv_text(value: object) -> object:
    """A cell: text that a spreadsheet would compute gets an apostrophe in front; numbers stay numbers."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


def _visible(character: str) -> str:
    """Unicode has pictures of the ASCII controls (U+2400 and on)."""
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"
