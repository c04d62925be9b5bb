"""metrics.jsonl: one line of JSON for each step of a training run, appended when the step ends.

    {"step": 1, "loss": 4.11, …, "crc32": "5d41402a"}

A line ends with a checksum of what comes before it, so even a damaged digit is noticed, and any program that reads JSON
can still read the file. A crash loses at most the line that was being written.

A line with a right checksum may still not be a valid row: another version or another program may have
written the line. So the fields are checked here, once, and all code that reads rows can rely on them.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minimoe.core import files
from minimoe.core.errors import UserError
from minimoe.core.files import unwritable, write_atomically
from minimoe.core.summary import Listed

FILE = "metrics.jsonl"

Row = dict[str, Any]


class Rows(Listed[Row]):
    """The lines of a run, in the order of its steps."""

    hint = "rows of metrics, one dictionary per step"


COUNTS = ("step", "tokens")
NUMBERS = ("loss", "total", "learning_rate", "gradient_norm", "tokens_per_second", "seconds")
BY_LAYER = ("dropped", "router_entropy")
AUXILIARY = ("balance", "importance", "load", "z")
"""The fields of a row, besides ``load`` (L, E) and, after an evaluation, ``val_loss``; ``auxiliary`` has one list of L
numbers for each of these names. L counts the layers with a router: a dense layer has no number in any of these lists.
"""

LONGEST_LINE = 100_000_000
"""The longest line that is read, in bytes; the line of a model with 100 layers of 256 experts has 300 kB."""


def read(folder: str | Path, up_to: int | None = None) -> Rows:
    """The rows, up to step ``up_to`` if given; none without a file. A last line that a crash cut short is left out.

    Raises:
        UserError: the file cannot be read, a line is damaged or missing or lacks a field, or the lines end before step
            ``up_to``.
    """
    path = files.user_path(folder) / FILE
    rows = Rows()
    try:
        with files.open_regular(path, "rb") as file:
            number = 0
            while line := file.readline(LONGEST_LINE):
                number += 1
                row = _parse(line)
                if row is None and not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                    break  # the last line
                if row is None or (rows and row["step"] != rows[-1]["step"] + 1):
                    raise UserError(
                        f"{path} is damaged at line {number}: restore it, or remove it to continue without it."
                    )
                if problem := _misfit(row, rows):
                    raise UserError(
                        f"{path} was written by another version or by hand: line {number} {problem}; restore it, or "
                        "remove it to continue without it."
                    )
                rows.append(row)
    except FileNotFoundError:
        return rows
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check the folder.") from None
    reached = rows[-1]["step"] if rows else 0
    if up_to is not None and reached < up_to:
        raise UserError(
            f"{path} ends at step {reached}, but the checkpoint is at step {up_to}: restore it, or remove it to "
            "continue without it."
        )
    return Rows(row for row in rows if up_to is None or row["step"] <= up_to)


def append(folder: Path, row: Row) -> None:
    """Adds a line and closes the file; raises ``UserError`` if it cannot be written."""
    path = folder / FILE
    try:
        with files.open_regular(path, "ab") as file:
            file.write(_line(row))
    except OSError as error:
        raise unwritable(path, error) from None


def sync(folder: Path) -> None:
    """Forces the appended lines to disk, if there is a file; raises ``UserError`` if that fails."""
    path = folder / FILE
    if not path.exists():
        return
    try:
        with files.open_regular(path, "ab") as file:
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path, error) from None


def write(folder: Path, rows: Iterable[Row]) -> None:
    """Replaces the file atomically; raises ``UserError`` if it cannot be written.

    Without a row, no new file is created: an empty one would later look as if it had lost its rows.
    """
    content = b"".join(map(_line, rows))
    if content or (folder / FILE).exists():
        write_atomically(folder / FILE, content)


def _line(row: Row) -> bytes:
    return (json.dumps(row | {"crc32": _checksum(row)}) + "\n").encode()


def _parse(line: bytes) -> Row | None:
    """The row that a line holds, or None if the line is damaged."""
    try:
        row: Row = json.loads(line)
        return row if row.pop("crc32") == _checksum(row) and type(row["step"]) is int else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _misfit(row: Row, earlier: Rows) -> str:
    """What is wrong with the fields of a row whose checksum is right; empty if nothing is wrong."""
    if "val_loss" in row and not _is_number(row["val_loss"]):
        return f"has val_loss {row['val_loss']!r:.40}, expected a finite number"
    for name in (*COUNTS, *NUMBERS):
        value = row.get(name)
        if not _is_number(value) or (name in COUNTS and not (type(value) is int and value >= 0)):
            return f"has {name} {value!r:.40}, expected a {'count' if name in COUNTS else 'finite number'}"
    load, auxiliary = row.get("load"), row.get("auxiliary")
    layers, experts = _shape(load)
    if not experts or (earlier and (layers, experts) != _shape(earlier[0]["load"])):
        return f"has load {load!r:.40}, expected as many numbers for each layer as the line before"
    by_layer = {name: row.get(name) for name in BY_LAYER}
    for name in AUXILIARY:
        by_layer[f"auxiliary {name}"] = auxiliary.get(name) if isinstance(auxiliary, dict) else None
    for name, values in by_layer.items():
        if not isinstance(values, list) or len(values) != layers or not all(map(_is_number, values)):
            return f"has {name} {values!r:.40}, expected {layers} finite numbers"
    return ""


def _shape(load: Any) -> tuple[int, int]:
    """(L, E) of a list of L lists of E finite numbers; (0, 0) for anything else."""
    if not isinstance(load, list) or not all(isinstance(layer, list) for layer in load):
        return 0, 0
    widths = {len(layer) for layer in load}
    if len(widths) != 1 or not all(_is_number(value) for layer in load for value in layer):
        return 0, 0
    return len(load), widths.pop()


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold, and finite."""
    return type(value) in (int, float) and abs(value) < 2**1000 and math.isfinite(value)


def _checksum(row: Row) -> str:
    return f"{zlib.crc32(json.dumps(row).encode()):08x}"
