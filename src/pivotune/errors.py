"""The one exception for a user's mistake."""

from __future__ import annotations

import re

# Everything that moves the cursor, changes colours or turns the direction of text, but not line ends and tabs; and halves
# of surrogate pairs, which no file and no terminal takes.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Longer messages are cut in the middle: a path and a few names fit, a whole row of a data file does not.
_LONGEST_MESSAGE = 4000
_SPACES = {ord(character): " " for character in "\t\n\r"}


class UsageError(ValueError):
    """Something the user wrote is wrong: a file, row, key or option.

    The message is one line that names the place, what was found and what is allowed. The command line prints it
    without a traceback and leaves with exit code 2; in Python it is an ordinary `ValueError`. Line ends and control
    characters, which may come from the user's data, are made visible, and what is very long is cut.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


def make_visible(text: str) -> str:
    """The text with every control and direction character replaced by a visible one; line ends and tabs stay."""
    return _CONTROL.sub(lambda match: _picture(match.group()), text)


def _picture(character: str) -> str:
    """Unicode has pictures of the ASCII controls (U+2400 and on)."""
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


def _one_line(message: str) -> str:
    if len(message) > _LONGEST_MESSAGE:
        half = _LONGEST_MESSAGE // 2
        message = f"{message[:half]} [...] {message[-half:]}"
    return make_visible(message.translate(_SPACES))
