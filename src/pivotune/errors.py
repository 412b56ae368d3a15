"""What one line says: a user's mistake, and what stops a training that was right."""

from __future__ import annotations

from pivotune.text.escaping import printable

# Longer messages are cut in the middle: a path and a few names fit, a whole row of a data file does not.
_LONGEST_MESSAGE = 4000
_SPACES = {ord(character): " " for character in "\t\n\r"}


class UsageError(ValueError):
    """Something the user wrote is wrong: a file, row, key or option.

    The message is one line that names the place, what was found and what is allowed. The command line prints it
    without a traceback and leaves with exit code 2; in Python it is an ordinary `ValueError`. Line ends and control
    characters, which may come from the user's data, are made visible, and what is very long is cut.

    Args:
        told: whether another process tells the same; the command line then says nothing.
    """

    def __init__(self, message: str, *, told: bool = False) -> None:
        super().__init__(_one_line(message))
        self.told = told


class TrainingError(RuntimeError):
    """Something stopped a training that was set up well: a loss that is no number, a lost process, a vanished folder.

    The message is one line that says what happened, what is kept and how to go on. The command line prints it without a
    traceback and leaves with exit code 1.
    """


def _one_line(message: str) -> str:
    if len(message) > _LONGEST_MESSAGE:
        half = _LONGEST_MESSAGE // 2
        message = f"{message[:half]} [...] {message[-half:]}"
    return printable(message.translate(_SPACES))
