"""Short texts for large values, so that the last line of a notebook's cell shows a few lines and not every number."""

from __future__ import annotations

from typing import Any, TypeVar

from minimoe.core import tree
from minimoe.core.errors import printable

Kind = TypeVar("Kind")
Item = TypeVar("Item")

WIDTH = 100
"""The largest number of characters in a line."""


def brief(kind: type[Kind]) -> type[Kind]:
    """Class decorator for a NamedTuple with large values: ``repr`` shows one short line for each field."""
    kind.__repr__ = _fields  # type: ignore[method-assign]
    return kind


class Listed(list[Item]):
    """A list that is shown as its length and a hint; in every other way, it is a list."""

    hint = ""
    """What the items are, and how to see them."""

    def __repr__(self) -> str:
        return f"<{len(self):,} {self.hint}>"


def line(value: Any) -> str:
    """What a value is, in at most ``WIDTH`` characters."""
    name = type(value).__name__
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        text = f"{value.dtype} {tuple(value.shape)}" if value.shape else repr(value)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        arrays = [leaf for leaf in tree.leaves(value) if hasattr(leaf, "dtype") and hasattr(leaf, "shape")]
        count = f"{len(arrays):,} array{'s' * (len(arrays) != 1)}"
        text = f"{name} of {count}, {sum(leaf.size for leaf in arrays):,} numbers" if arrays else name
    elif isinstance(value, Listed):
        text = repr(value)
    elif isinstance(value, list) and len(value) > 1 and all(hasattr(item, "_fields") for item in value):
        text = f"list of {len(value):,} {type(value[0]).__name__}, the first of them {line(value[0])}"
    elif isinstance(value, list | tuple | set) and len(value) > 4:
        text = f"{name} of {len(value):,}"
    elif isinstance(value, list):
        text = "[" + ", ".join(map(line, value)) + "]"
    elif isinstance(value, dict):
        text = f"dict of {len(value):,}: " + ", ".join(map(str, list(value)[:8]))
    else:
        text = repr(value)
    text = printable(" ".join(text.split()))
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


def _fields(value: Any) -> str:
    """A NamedTuple: its name, and a line for each field."""
    width = max(map(len, value._fields))
    lines = [f"  {field.ljust(width)}  {line(part)}" for field, part in zip(value._fields, value, strict=True)]
    return "\n".join([f"{type(value).__name__}(", *lines, ")"])
