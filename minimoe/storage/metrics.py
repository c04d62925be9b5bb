"""metrics.jsonl: one line of JSON for each step of a training run, appended when the step ends.

    {"step": 1, "loss": 4.11, …, "crc32": "5d41402a"}

A line ends with a checksum of what comes before it, so even a damaged digit is noticed, and any program that reads JSON
can still read the file. A crash loses at most the line that was being written.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minimoe.core.errors import UserError
from minimoe.core.files import unwritable, write_atomically

FILE = "metrics.jsonl"

Row = dict[str, Any]


def read(folder: str | Path, up_to: int | None = None) -> list[Row]:
    """The rows, up to step ``up_to`` if given; none without a file. A last line that a crash cut short is left out.

    Raises:
        UserError: the file cannot be read, a line is damaged or missing, or the lines end before step ``up_to``.
    """
    path = Path(folder) / FILE
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the folder.") from None
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        row = _parse(line)
        if row is None and number == len(lines) and not line.endswith(b"\n"):
            break
        if row is None or (rows and row["step"] != rows[-1]["step"] + 1):
            raise UserError(f"{path} is damaged at line {number}: restore it, or remove it to continue without it.")
        rows.append(row)
    reached = rows[-1]["step"] if rows else 0
    if up_to is not None and reached < up_to:
        raise UserError(
            f"{path} ends at step {reached}, but the checkpoint is at step {up_to}: restore it, or remove it to "
            "continue without it."
        )
    return [row for row in rows if up_to is None or row["step"] <= up_to]


def append(folder: Path, row: Row) -> None:
    """Adds a line and closes the file; raises ``UserError`` if it cannot be written."""
    path = folder / FILE
    try:
        with path.open("ab") as file:
            file.write(_line(row))
    except OSError as error:
        raise unwritable(path, error) from None


def sync(folder: Path) -> None:
    """Forces the appended lines to disk, if there is a file; raises ``UserError`` if that fails."""
    path = folder / FILE
    if not path.exists():
        return
    try:
        with path.open("ab") as file:
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


def _checksum(row: Row) -> str:
    return f"{zlib.crc32(json.dumps(row).encode()):08x}"
