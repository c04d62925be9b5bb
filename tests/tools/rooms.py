"""The rooms of the package, in their order, and the two pages that show them. Run this file to bring these up to date.

    python tests/tools/rooms.py

A module imports from its own room or from one that stands before it, never from one after it. The question that a room
answers is the first sentence of its ``__init__.py``; README's tree and CONTRIBUTING's order are written from both.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "minimoe"
BEGIN, END = "<!-- rooms: written by tests/tools/rooms.py -->", "<!-- end of rooms -->"

ROOMS = (
    "core",
    "text",
    "layers",
    "parallel",
    "losses",
    "optim",
    "cost",
    "draw",
    "inference",
    "beyond",
    "compression",
    "proof",
    "storage",
    "evaluate",
    "analysis",
    "training",
    "tuning",
    "timing",
    "exercises",
    "cli",
)
INSIDE = {"layers": ("routers", "experts")}
"""Rooms within a room."""


def question(room: str) -> str:
    """What a room answers: ``What does everything use?``"""
    return docstring(room).partition("?")[0].replace("\n", " ") + "?"


def docstring(room: str) -> str:
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
    assert text, f"minimoe/{room}/__init__.py says nothing"
    return text


def modules(room: str) -> list[str]:
    """The files of a room, without those of the rooms within it."""
    return sorted(path.stem for path in (PACKAGE / room).glob("*.py") if path.stem != "__init__")


def tree() -> str:
    """README's tree: a line for each room."""
    lines = [("minimoe/", ""), ("  reference.py", "The whole model plainly, in one file: read it first.")]
    for room in ROOMS:
        lines.append((f"  {room}/", question(room)))
        lines += [(f"    {inner}/", question(f"{room}/{inner}")) for inner in INSIDE.get(room, ())]
    lines += [("lessons/", "Notebooks that explain each component, and where it comes from.")]
    lines += [("tests/", "Tests and proofs, in the same rooms.")]
    lines += [("data/", "The texts and images that it learns from.")]
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(["```", *(f"{name:<{width}}{what}".rstrip() for name, what in lines), "```"])


def order() -> str:
    """CONTRIBUTING's list: the rooms in their order, and what stands in each."""
    lines = []
    for number, room in enumerate(ROOMS, 1):
        names = ", ".join(modules(room)) if room != "exercises" else "engine, feedback, diagnosis, bugs, one per lesson"
        inner = "".join(f"; {each}/ ({', '.join(modules(f'{room}/{each}'))})" for each in INSIDE.get(room, ()))
        lines.append(f"{number}. `{room}/`: {names}{inner}")
    return "\n".join(lines)


PAGES = {"README.md": tree, "CONTRIBUTING.md": order}


def stated(page: str) -> str:
    """What a page says now."""
    return (ROOT / page).read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def write() -> None:
    """Puts the rooms into both pages."""
    for page, shown in PAGES.items():
        head, _, rest = (ROOT / page).read_text(encoding="utf-8").partition(BEGIN)
        (ROOT / page).write_text(f"{head}{BEGIN}\n{shown()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    write()
