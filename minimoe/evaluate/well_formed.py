"""Is a text well formed? Python that parses, and brackets and quotes that are closed.

To write such a text, a model must remember what was opened, and where. A text that a model writes stops at a given
length, not at its end, so it is cut where it could have ended: Python before the next definition, other text after its
last whole line.
"""

from __future__ import annotations

import ast
import re
import warnings

DEFINITION = "\n\n\ndef "
"""The beginning of a definition that is not indented; the model continues it."""

CLOSES = {")": "(", "]": "[", "}": "{", "»": "«", "”": "“"}


def has_python(text: str) -> bool:
    """Whether a text contains definitions at all; a model that never saw one cannot be expected to write one."""
    return re.search(rf"{DEFINITION}\w+\(.*\).*:\n", text) is not None


def first_definition(text: str) -> str:
    """``text``, which begins with a definition, up to the next line that is not indented.

    If there is no such line, the last line is left out, since it may be incomplete.
    """
    text = text.lstrip("\n")
    following = re.search(r"\n(?=[^\s)\]}])", text)  # a bracket at the start of a line closes a list of arguments
    return text[: following.start() + 1 if following else text.rfind("\n") + 1]


def parses(source: str) -> bool:
    """Whether Python's own parser accepts ``source``, and ``source`` is not empty. It is never run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape sequence causes a warning, but parses
            return bool(ast.parse(source).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def whole_lines(text: str) -> str:
    """``text`` up to the end of its last whole line; all of it if it has none."""
    return text[: text.rfind("\n") + 1] or text


def has_brackets(text: str) -> bool:
    """Whether there is a bracket or a double quote in the text, so that there is something to close."""
    return re.search(r"[][(){}«»“”\"]", text) is not None


def is_closed(text: str) -> bool:
    """Whether every bracket is closed by its counterpart, in order, and straight double quotes come in pairs.

    Single quotes do not count, because they are also apostrophes.
    """
    opened: list[str] = []
    for character in text:
        if character in CLOSES.values():
            opened.append(character)
        elif character in CLOSES and (not opened or opened.pop() != CLOSES[character]):
            return False
    return not opened and text.count('"') % 2 == 0
