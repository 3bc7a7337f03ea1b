"""Define the errors that reach a user as one line instead of a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The user's input cannot work. The message gives the value, the rule and the fix."""


class TrainingStopped(Exception):
    """Training cannot usefully continue. The message gives the reason and the fix; a checkpoint is saved."""


def did_you_mean(unknown: str, known: Iterable[str]) -> str:
    """Return the end of an error message: the known name nearest to `unknown`, or all names if none is near."""
    names = list(known)
    close = difflib.get_close_matches(unknown, names, n=1)
    if close:
        return f". Did you mean {close[0]!r}?"
    return f". Choose from: {', '.join(names)}." if names else "."


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not blank, or the name of its class."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def told(error: Exception) -> str:
    """Return why a file could not be used: the system's words, or the first line of another error."""
    return getattr(error, "strerror", None) or first_line(error)


def printable(line: str) -> str:
    """Escape control characters: text from a file or another process must not control the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
