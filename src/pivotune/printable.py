"""Text from outside made harmless for a terminal: rows, model folders, configurations and file names are not ours."""

from __future__ import annotations

import re

# Everything that moves the cursor, changes colours or turns the direction of text, but not line ends and tabs.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with every control and direction character made visible, one for one: data must not drive the terminal."""
    return _CONTROL.sub(lambda match: _visible(match.group()), text.replace("\r\n", "\n"))


def printable_json(document: str) -> str:
    """A JSON document in which such characters are written as JSON's own escapes; its meaning stays the same."""
    # Outside of strings JSON has line ends and blanks only, and these are not touched.
    return _CONTROL.sub(lambda match: f"\\u{ord(match.group()):04x}", document)


def _visible(character: str) -> str:
    """Unicode has pictures of the ASCII controls (U+2400 and on)."""
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"
