"""How a weight matrix becomes blocks, and how codes of a few bits become bytes.

A matrix is (inputs, outputs) here and (outputs, inputs) in bitsandbytes and HQQ. In these libraries, the blocks follow
each other along the rows of (outputs, inputs), so a matrix is transposed here before it is divided: a block then holds
weights of one output, or of two that follow each other if the inputs do not fill whole blocks.

The codes of R blocks of G weights, (R, G), are packed in HQQ's layout. Several blocks share one integer: with 4 bits,
the first half of the blocks is in the high half of each byte and the second half in the low half. With 2 bits, each
quarter of a byte holds a quarter of the blocks. With 3 bits, ten blocks share an int32, of which two bits are not used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.core.errors import UserError

DTYPES = ("float16", "float32")
"""The types of weights that can be quantised."""


class Packing(NamedTuple):
    """How codes share an integer."""

    dtype: type[np.generic]
    codes: int  # in one integer


PACKINGS = {2: Packing(np.uint8, 4), 3: Packing(np.int32, 10), 4: Packing(np.uint8, 2)}
"""The packing of codes with each number of bits."""


def checked(w: NDArray[Any]) -> NDArray[np.float64]:
    """The weight matrix ``w`` in float64; every step of quantisation is computed in float64.

    Raises:
        UserError: ``w`` is not a matrix of float16 or float32, is empty, or holds a number that is not finite.
    """
    if w.dtype.name not in DTYPES:
        raise UserError(f"weights of type {w.dtype} cannot be quantised, only {' and '.join(DTYPES)}: convert them.")
    if w.ndim != 2 or not w.size:
        raise UserError(f"weights of shape {w.shape} cannot be quantised: give a matrix (inputs, outputs), not empty.")
    if not np.isfinite(w).all():
        raise UserError(
            f"a weight is {w[~np.isfinite(w)][0]}, which has no code: the model is damaged or has diverged, so use "
            "another copy or an earlier checkpoint."
        )
    return w.astype(np.float64)


def checked_size(size: int, what: str) -> int:
    """``size``, or a ``UserError`` if blocks cannot have this size."""
    if size < 1:
        raise UserError(f"{what} {size} is too small: a {what} must hold at least 1 weight.")
    return size


def blocks(w: NDArray[np.float64], size: int, mode: Any) -> NDArray[np.float64]:
    """w (inputs, outputs) → (R, size), the transposed matrix cut into blocks.

    If the size does not divide the number of weights, the last block is filled up. If ``mode`` is ``"constant"``, it is
    filled with zeros. If it is ``"edge"``, it is filled with copies of the last weight, which change no maximum and no
    minimum.
    """
    flat = w.T.reshape(-1)
    return np.pad(flat, (0, -flat.size % size), mode).reshape(-1, size)


def matrix(values: NDArray[Any], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Blocks → the matrix (inputs, outputs) that they were cut from, in float32."""
    inputs, outputs = shape
    flat = values.reshape(-1)[: inputs * outputs]
    return np.ascontiguousarray(flat.reshape(outputs, inputs).T, np.float32)


def number_of_blocks(shape: tuple[int, int], size: int) -> int:
    """R for a matrix of this shape."""
    return -(-shape[0] * shape[1] // size)


def packed_shape(count: int, size: int, bits: int) -> tuple[int, int]:
    """The shape of the packed codes of ``count`` blocks."""
    return -(-count // PACKINGS[bits].codes), size


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[Any]:
    """codes (R, G) below 2^bits → (⌈R / codes in an integer⌉, G), filled up with blocks of zeros."""
    dtype, per = PACKINGS[bits]
    filled = np.pad(codes, ((0, -len(codes) % per), (0, 0))).astype(dtype)
    parts = filled.reshape(per, -1, codes.shape[1])
    packed = np.zeros(parts.shape[1:], dtype)
    for part in parts:  # the first part ends in the highest bits
        packed = (packed << bits) | part
    return packed


def unpack(packed: NDArray[Any], bits: int, count: int) -> NDArray[np.uint8]:
    """The ``count`` blocks of codes that ``pack`` packed."""
    per = PACKINGS[bits].codes
    parts = [(packed >> bits * place) & (2**bits - 1) for place in reversed(range(per))]
    return np.concatenate(parts)[:count].astype(np.uint8)


def unpack_range(packed: NDArray[Any], bits: int, start: int, stop: int) -> NDArray[np.uint8]:
    """The blocks of codes from ``start`` up to ``stop``, without unpacking the others."""
    per, height = PACKINGS[bits].codes, len(packed)
    parts = []
    for part in range(start // height, -(-stop // height)):  # the parts that hold some of these blocks
        rows = packed[max(start - part * height, 0) : min(stop - part * height, height)]
        parts.append((rows >> bits * (per - 1 - part)) & (2**bits - 1))
    return np.concatenate(parts).astype(np.uint8)
