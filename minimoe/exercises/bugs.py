"""Bugs: ways in which this package could be wrong, each made by replacing a line, or a few lines that belong together.

``bugs.toml`` lists them. Some were seen in public code, and lesson 15 shows ten of these. The others are common
mistakes in derivations and indexing: a sign, an axis, a term, a shift by one. The tests put each bug into a copy of the
package, where at least one test must fail (``tests/mutations``).

    with installed(load()["scale"]):        this process's package, with attention scaled by the width of the model
        ...
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

LIST = Path(__file__).with_name("bugs.toml")

KINDS = (
    "flipped sign",
    "swapped",  # two axes, operands or orders, each in the place of the other
    "dropped term",
    "off by one",  # a window, a shift, a count
    "stale",  # an old value where a new one belongs, or one value used for all
    "wrong scale",  # by K, N, E, √C, ...
    "wrong quantity",
    "leak",  # the future, padding, noise or a neighbour reaches what it must not
    "unstable",
)


class Bug(NamedTuple):
    name: str
    file: str  # within the package
    kind: str  # one of KINDS
    changes: list[tuple[str, str]]  # lines of the package → the same lines with the bug
    seen_in: list[str]  # public code that had it, as owner/repository#number of the issue or pull request

    @property
    def module(self) -> str:
        return "minimoe." + self.file.removesuffix(".py").replace("/", ".")

    def put_into(self, source: str) -> str:
        """The module's ``source`` with this bug in it; raises ``ValueError`` unless each line occurs exactly once."""
        for right, wrong in self.changes:
            if source.count(right) != 1:
                raise ValueError(f"bug {self.name!r}: {self.file} has {source.count(right)} times {right!r}, not once.")
            source = source.replace(right, wrong)
        return source

    def __str__(self) -> str:
        """The changes, in the style of a diff."""
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
    """Puts the bug into the package of this process until the block ends."""
    module = importlib.import_module(bug.module)
    names = vars(module)
    intact = dict(names)
    exec(compile(bug.put_into(inspect.getsource(module)), bug.file, "exec"), names)
    replaced = _replace_imported(intact, names)
    try:
        yield
    finally:
        names.clear()
        names.update(intact)
        for importer, name in replaced:
            importer[name] = intact[name]


def _replace_imported(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Replaces what other modules of the package imported by name, as in ``from … import combine``."""
    importers = [vars(module) for name, module in list(sys.modules.items()) if name.startswith("minimoe.")]
    replaced = [
        (importer, name)
        for importer in importers
        for name in importer.keys() & old.keys() & new.keys()
        if importer[name] is old[name] is not new[name]
    ]
    for importer, name in replaced:
        importer[name] = new[name]
    return replaced


def _indented(lines: str) -> str:
    return lines.strip().replace("\n", "\n  ")
