"""The one exception for a user's mistake."""


class UsageError(ValueError):
    """Something the user wrote is wrong: a file, row, key or option.

    The message is one line that names the place, what was found and what is allowed. The command line prints it
    without a traceback and leaves with exit code 2; in Python it is an ordinary `ValueError`.
    """
