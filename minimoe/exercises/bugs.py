"""Bugs: ways in which this package could be wrong, each made by exchanging a line of it, or a few that belong together.

``bugs.toml`` lists them. Some are real: public code had them, and lesson 15 shows ten of these. The others are the
slips of a hand that derives and indexes: a sign, an axis, a term, a shift by one. The tests put every one of them into
a copy of the package, where one of them must notice (``tests/mutations``).

    with installed(load()["scale"]):        this process's package, with attention scaled by the width of the model
        ...
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LIST = Path(__file__).with_name("bugs.toml")

KINDS = (
    "flipped sign",
    "swapped",  # two axes, operands or orders, one where the other belongs
    "dropped term",
    "off by one",  # a window, a shift, a count
    "stale",  # an old value where a new one belongs, or one of many for all
    "wrong scale",  # by K, N, E, √C, ...
    "wrong quantity",
    "leak",  # the future, padding, noise or a neighbour reaches what it must not
    "unstable",
)


class Bug(NamedTuple):
    name: str
    file: str  # within the package
    kind: str  # one of KINDS
    changes: list[tuple[str, str]]  # what stands in the package → what stands there with the bug
    seen_in: list[str]  # public code that had it, as owner/repository#number of the issue or pull request

    @property
    def module(self) -> str:
        return "minimoe." + self.file.removesuffix(".py").replace("/", ".")

    def put_into(self, source: str) -> str:
        """The source of the module with this bug in it; raises ``ValueError`` if a line does not stand there once."""
        for right, wrong in self.changes:
            if source.count(right) != 1:
                raise ValueError(f"bug {self.name!r}: {self.file} has {source.count(right)} times {right!r}, not once.")
            source = source.replace(right, wrong)
        return source

    def __str__(self) -> str:
        """The changes, as lines to read."""
        pairs = [("- " + _indented(right), "+ " + _indented(wrong)) for right, wrong in self.changes]
        return "\n".join([self.file, *(line for pair in pairs for line in pair)])


def load() -> dict[str, Bug]:
    """Every bug by its name, in the order of the list."""
    return {
        name: Bug(name, entry["file"], entry["kind"], [(a, b) for a, b in entry["changes"]], entry.get("seen_in", []))
        for name, entry in tomllib.loads(LIST.read_text(encoding="utf-8")).items()
    }


@contextlib.contextmanager
def installed(bug: Bug) -> Iterator[None]:
    """The package of this process with the bug in it, until the block ends."""
    module = importlib.import_module(bug.module)
    names = vars(module)
    intact = dict(names)
    exec(compile(bug.put_into(inspect.getsource(module)), bug.file, "exec"), names)
    try:
        yield
    finally:
        names.clear()
        names.update(intact)


def _indented(lines: str) -> str:
    return lines.strip().replace("\n", "\n  ")
