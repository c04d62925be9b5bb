"""Is a text well formed? Python that parses, and brackets and quotes that are closed.

Both need a memory of what was opened, and where. What a model writes stops at a length, not at an end, so it is cut
where a text could end: Python before the next definition, anything else after its last whole line.
"""

from __future__ import annotations

import ast
import re
import warnings

DEFINITION = "\n\n\ndef "
"""What a definition at the beginning of a line begins with; a model is asked to continue it."""

CLOSES = {")": "(", "]": "[", "}": "{", "»": "«", "”": "“"}


def has_python(text: str) -> bool:
    """Whether a text holds definitions at all; of a model that never met one nothing can be expected."""
    return re.search(rf"{DEFINITION}\w+\(.*\).*:\n", text) is not None


def first_definition(text: str) -> str:
    """``text``, which begins with a definition, up to the next thing that stands at the beginning of a line.

    Without such a thing the last line is left out, since it may be half a line.
    """
    text = text.lstrip("\n")
    following = re.search(r"\n(?=[^\s)\]}])", text)  # a bracket there closes a long list of arguments
    return text[: following.start() + 1 if following else text.rfind("\n") + 1]


def parses(source: str) -> bool:
    """Whether Python's own parser accepts a source that is not empty. It is never run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a doubtful escape sequence is worth a warning, and parses
            return bool(ast.parse(source).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def whole_lines(text: str) -> str:
    """``text`` up to its last end of line; all of it if it has none."""
    return text[: text.rfind("\n") + 1] or text


def has_brackets(text: str) -> bool:
    """Whether there is a bracket or a double quote in the text, so that there is something to close."""
    return re.search(r"[][(){}«»“”\"]", text) is not None


def is_closed(text: str) -> bool:
    """Whether every bracket is closed by its like, in order, and straight double quotes come in pairs.

    Single quotes are left out: they are apostrophes too.
    """
    opened: list[str] = []
    for character in text:
        if character in CLOSES.values():
            opened.append(character)
        elif character in CLOSES and (not opened or opened.pop() != CLOSES[character]):
            return False
    return not opened and text.count('"') % 2 == 0
