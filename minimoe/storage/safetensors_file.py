"""The safetensors format, read without loading the whole file: tensors are described first, then copied one by one.

    8 bytes    length of the header, little-endian
    header     JSON: {"head.weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, …}
    data       the tensors, one after the other, row by row

A large model must not be in memory twice, so a file is mapped, not read, and a tensor is copied to its place a few rows
at a time. Numbers become float32 on the way. This includes bfloat16, which NumPy does not have: a bfloat16 is the first
half of a float32.

A header can claim anything. Each claim is checked against the size of the file before memory is allocated for it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.core.errors import UserError
from minimoe.core.files import open_regular, size_of_regular, unwritable

NUMBERS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""The types of weights that can be read, each with NumPy's name; a bfloat16 is read as its bits."""

CODES = {"U8": "u1", "I8": "i1", "I32": "<i4"}
"""The types of the codes of quantised weights."""

TYPES = NUMBERS | CODES

LARGEST = 2**63
"""Every size and offset in a file must be smaller than this, because Python would accept integers of any length."""

LONGEST_HEADER = 100_000_000
"""The limit of the safetensors library, in bytes; the header of a model of 100,000 tensors takes a tenth."""

ROWS = 128
"""Rows copied at a time: transposing a few rows is 3 times faster, because they stay in the processor's cache."""


class Stored(NamedTuple):
    """A tensor, or some of its rows, in a file."""

    path: Path
    name: str
    dtype: str  # a key of TYPES
    shape: tuple[int, ...]
    start: int  # first byte, counted from the beginning of the file


def describe(path: Path, only: Collection[str] | None = None, types: Collection[str] = NUMBERS) -> dict[str, Stored]:
    """Every tensor of a file by its name, or only the tensors that ``only`` names; no tensor is read.

    Tensors that are left out may be of any type, but the file must be whole all the same.

    Raises:
        UserError: the file cannot be read, is cut short or too long, or holds a type that is not in ``types``: float32,
            float16 and bfloat16 unless others are given.
    """
    try:
        size = size_of_regular(path)
        with open_regular(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise UserError(f"{path} is cut short or not a safetensors file: its header is longer than the file.")
            if length > LONGEST_HEADER:
                raise UserError(
                    f"{path} is not a safetensors file: its header has {length:,} bytes, expected at most "
                    f"{LONGEST_HEADER:,}; download it again."
                )
            header = json.loads(file.read(length))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} cannot be read ({reason}): check the folder, or download it again.") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a safetensors file: its header is not JSON; download it again.") from None
    if not isinstance(header, dict):
        raise UserError(f"{path} is not a safetensors file: its header is a {type(header).__name__}, not an object.")
    header.pop("__metadata__", None)

    first = 8 + length
    found, spans = {}, []
    for name, claim in header.items():
        tensor, stop = _stored(path, name, claim, first)
        spans.append((tensor.start, stop, name))
        if only is None or name in only:
            _check_type(tensor, stop, types)
            found[name] = tensor
    end = first
    for start, stop, name in sorted(spans):  # each must begin where the one before it ends: no hole, no overlap
        if start != end:
            raise UserError(
                f"{path} places the tensor {name} at byte {start}, expected {end}, where the "
                "previous one ends: the file is damaged; download it again."
            )
        end = stop
        if end > size:
            raise UserError(
                f"{path} is cut short: the tensor {name} ends at byte {end}, but the file has {size}; "
                "download it again."
            )
    if end != size:
        raise UserError(f"{path} has {size - end} bytes after its last tensor: it is damaged; download it again.")
    return found


def _stored(path: Path, name: str, claim: Any, first: int) -> tuple[Stored, int]:
    """The tensor of a header entry, and the byte after it; ``first`` is the first byte of the data.

    Raises:
        UserError: the entry is invalid.
    """
    match claim:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]} if (
            len(shape) <= 8 and all(type(n) is int and 0 <= n < LARGEST for n in shape) and 0 <= start <= stop < LARGEST
        ):
            return Stored(path, name, dtype, tuple(shape), first + start), first + stop
    raise UserError(f"{path} has an invalid header entry for the tensor {name}: download it again.")


def _check_type(tensor: Stored, stop: int, types: Collection[str]) -> None:
    """Raises ``UserError`` unless the tensor is of a type that can be read, and fills its bytes up to ``stop``."""
    path, name, dtype, shape, start = tensor
    if dtype not in types:
        raise UserError(f"{path} holds the tensor {name} as {dtype}, expected {', '.join(types)}: convert it first.")
    if size_of(tensor) != stop - start:
        raise UserError(
            f"{path} gives the tensor {name} {stop - start} bytes, but {dtype} {list(shape)} takes {size_of(tensor)}: "
            "the file is damaged; download it again."
        )


def size_of(tensor: Stored) -> int:
    """The size of a tensor in its file, in bytes."""
    return math.prod(tensor.shape) * np.dtype(TYPES[tensor.dtype]).itemsize


def copy(tensor: Stored, place: NDArray[Any]) -> None:
    """Reads a tensor into ``place``, an array or a view of the same shape, and converts it to the dtype of
    ``place``."""
    for start, rows in _pieces(tensor):
        place[start : start + ROWS] = rows


def equals(tensor: Stored, values: NDArray[Any]) -> bool:
    """Whether a tensor holds exactly ``values``, an array or a view of the same shape in float32, bit for bit."""
    return all(
        rows.astype(np.float32, order="C").tobytes() == values[start : start + ROWS].astype("<f4", order="C").tobytes()
        for start, rows in _pieces(tensor)
    )


def _pieces(tensor: Stored) -> Iterator[tuple[int, NDArray[Any]]]:
    """The rows of a tensor, ``ROWS`` at a time, each piece with the number of its first row."""
    mapped = np.memmap(tensor.path, NUMBERS[tensor.dtype], "r", tensor.start, tensor.shape)
    for start in range(0, len(mapped), ROWS):
        rows = mapped[start : start + ROWS]
        yield start, widen(rows) if tensor.dtype == "BF16" else rows


def widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16, given as bits → float32, exactly: both begin with the sign, the exponent and 7 bits of the fraction."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def write(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Writes a new file of float32 tensors, one at a time, so that no more than one transposed view is copied at once.

    The file is on the disk when this returns, so a file that is written later shows that this one is whole.

    Raises:
        UserError: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # older versions of transformers require it
    end = 0
    for name, values in tensors.items():
        header[name] = {"dtype": "F32", "shape": values.shape, "data_offsets": [end, end + 4 * values.size]}
        end += 4 * values.size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that every number is at a multiple of its size
    try:
        with path.open("xb") as file:
            file.write(len(encoded).to_bytes(8, "little"))
            file.write(encoded)
            for values in tensors.values():
                file.write(np.ascontiguousarray(values, "<f4").data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path, error) from None
