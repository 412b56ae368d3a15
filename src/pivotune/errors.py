"""Errors that the command line prints in one line: mistakes of the user, and faults that stop a training."""

from __future__ import annotations

from pivotune.text.escaping import printable

# Longer messages are cut in the middle: a path and a few names fit, a whole row of a data file does not.
_LONGEST_MESSAGE = 4000
_SPACES = {ord(character): " " for character in "\t\n\r"}


class UsageError(ValueError):
    """A mistake of the user in a file, row, key or option.

    The message is one line that names the place, the value found and the allowed values. The command line prints it without
    a traceback and exits with code 2; in Python it is an ordinary `ValueError`. Line ends and control characters, which may
    come from the user's data, are made visible, and a very long message is cut.

    Args:
        reported: another process reports the same mistake, so the command line prints nothing.
    """

    def __init__(self, message: str, *, reported: bool = False) -> None:
        if len(message) > _LONGEST_MESSAGE:
            half = _LONGEST_MESSAGE // 2
            message = f"{message[:half]} [...] {message[-half:]}"
        super().__init__(printable(message.translate(_SPACES)))
        self.reported = reported


class TrainingError(RuntimeError):
    """A fault that stops a well-configured training: a non-finite loss, a lost process, a removed folder.

    The message is one line with the fault, the files that are kept and the way to continue. The command line prints it
    without a traceback and exits with code 1.
    """
