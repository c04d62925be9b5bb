"""Messages to the user: the one exception, and text that cannot control a terminal."""

import difflib
from collections.abc import Iterable
from unicodedata import category


class UserError(ValueError):
    """Bad input, explained in one sentence: the value, what was expected and what to do.

    The command line prints the sentence and exits with code 2; in Python it is an ordinary ``ValueError``.
    """


def printable(text: str) -> str:
    """``text`` with its control characters made visible, so that it cannot control the terminal that shows it."""
    return "".join(c if c.isprintable() or c in "\n\t" or category(c) == "Zs" else repr(c)[1:-1] for c in text)


def suggestion(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'toy'?)`` if one of the ``known`` names is close to ``name``, otherwise nothing."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
