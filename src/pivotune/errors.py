"""What one line says: a user's mistake, and what stops a training that was right."""


class UsageError(ValueError):
    """Something the user wrote is wrong: a file, row, key or option.

    The message is one line that names the place, what was found and what is allowed. The command line prints it
    without a traceback and leaves with exit code 2; in Python it is an ordinary `ValueError`.
    """


class TrainingError(RuntimeError):
    """Something stopped a training that was set up well: a loss that is no number, a lost process, a vanished folder.

    The message is one line that says what happened, what is kept and how to go on. The command line prints it without a
    traceback and leaves with exit code 1.
    """
