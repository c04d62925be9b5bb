"""Instructions and preferences: short exchanges to tune a model with, read from files of one JSON object a line.

    {"kind": "sum", "document": "3 + 4", "turns": [["user", "What is 3 + 4?"], ["assistant", "7"]]}
    {"kind": "length", "document": "3 + 4", "prompt": [["user", "3 + 4"]], "chosen": "7", "rejected": "Well, let me …"}

A document is what an exchange is about. ``split`` holds out whole documents, so a question of the validation part is
never a question of the training part. The same document falls on the same side in every file: a model that was tuned
with instructions and then with preferences has seen none of the documents that are held out in either file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from minimoe.core import files
from minimoe.core.errors import UserError
from minimoe.text import chat
from minimoe.text.chat import Turn

INSTRUCTIONS, PREFERENCES = "instructions.jsonl", "preferences.jsonl"
"""The two files of ``data/``."""

HELD_OUT = 0.1
"""About this share of the documents is held out."""


class Instruction(NamedTuple):
    """An exchange to learn from."""

    kind: str  # what it asks for, such as "sum"
    turns: tuple[Turn, ...]  # the last one is the assistant's
    document: str


class Pair(NamedTuple):
    """Two answers to one question, of which the first is better."""

    kind: str  # in what it is better, such as "length"
    prompt: tuple[Turn, ...]  # the last one is the user's
    chosen: str
    rejected: str
    document: str


Item = TypeVar("Item", Instruction, Pair)


def read(path: str | Path | None = None) -> list[Instruction]:
    """The instructions in a file, or those of ``data/``.

    Raises:
        UserError: the file cannot be read, or a line is not an instruction.
    """
    return _read(path, INSTRUCTIONS, _instruction)


def read_pairs(path: str | Path | None = None) -> list[Pair]:
    """The preferences in a file, or those of ``data/``.

    Raises:
        UserError: the file cannot be read, or a line is not a pair of answers.
    """
    return _read(path, PREFERENCES, _pair)


def split(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """The items to train on, and those to validate on: about a tenth of the documents, always the same ones.

    A document is held out by the checksum of its name alone, so it stays in its part when other documents are added.

    Raises:
        UserError: one of the two parts is empty, because there are too few documents.
    """
    validation = [item for item in items if is_held_out(item.document)]
    train = [item for item in items if not is_held_out(item.document)]
    if not (train and validation):
        raise UserError(
            f"{len({item.document for item in items})} documents are too few to hold out a tenth of them: give more "
            "exchanges, each with the document that it is about."
        )
    return train, validation


def is_held_out(document: str) -> bool:
    """Whether ``split`` validates on this document."""
    checksum = sha256(document.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(checksum[:4], "big") < HELD_OUT * 2**32


def _read(path: str | Path | None, name: str, make: Callable[[dict[str, Any]], Item]) -> list[Item]:
    path = _in_data(name) if path is None else files.user_path(path)
    try:
        lines = files.read_text(path).removeprefix("\ufeff").split("\n")  # Windows puts a mark there
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): give a UTF-8 file like data/{name}, or put back the one that a run was "
            "tuned with."
        ) from None
    items: list[Item] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise ValueError("it is not an object")
            items.append(make(values))
            if values:
                raise ValueError(f"it has an unknown field {next(iter(values))!r:.40}")
        except (ValueError, TypeError, RecursionError) as error:
            problem = str(error).rstrip(".")
            raise UserError(f"{path}, line {number}: {problem}; write it like the lines of data/{name}.") from None
        except KeyError as error:
            raise UserError(f"{path}, line {number}: {error} is missing; write it like data/{name}.") from None
    if not items:
        raise UserError(f"{path} is empty: give a file with one exchange a line, like data/{name}.")
    return items


def _instruction(values: dict[str, Any]) -> Instruction:
    found = Instruction(_text(values, "kind"), _turns(values, "turns"), _text(values, "document"))
    if found.turns[-1].role != "assistant":
        raise ValueError("the last turn is not the assistant's")
    return found


def _pair(values: dict[str, Any]) -> Pair:
    names = ("chosen", "rejected", "document")
    found = Pair(_text(values, "kind"), _turns(values, "prompt"), *(_text(values, name) for name in names))
    if found.prompt[-1].role != "user":
        raise ValueError("the last turn of the prompt is not the user's")
    if found.chosen == found.rejected:
        raise ValueError("both answers are the same")
    return found


def _text(values: dict[str, Any], name: str) -> str:
    value = values.pop(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is {value!r:.40}, expected a text")
    return value


def _turns(values: dict[str, Any], name: str) -> tuple[Turn, ...]:
    turns = values.pop(name)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{name} is {turns!r:.40}, expected a list of turns")
    for turn in turns:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(part, str) and part for part in turn)):
            raise ValueError(f"a turn is {turn!r:.40}, expected a role and a text")
    found = tuple(Turn(role, text) for role, text in turns)
    chat.check(found)
    return found


def _in_data(name: str) -> Path:
    # In an installed wheel the data are inside the package; in a checkout they are next to it.
    package = Path(__file__).parent.parent
    inside = package / "_data"
    return (inside if inside.is_dir() else package.parent / "data") / name
