"""Four bits for normally distributed weights: blocks of 64, each divided by its largest weight, and 16 unequal levels.

    c = max |w| of a block,    code = the level nearest to w/c,    w ≈ level c

The levels are quantiles of a normal distribution, divided by the largest: they are dense near zero, where most weights
are. One level is exactly 0. The smaller code wins a tie.

Sixteen levels need 4 bits a weight, but a float32 c for each block of 64 adds half a bit. Double quantisation keeps the
c of all blocks in 8 bits: the mean of all c is subtracted; then 256 numbers at a time are divided by the largest of the
256, and rounded to a map of 256 values whose steps grow with the size of the number. A weight then takes 4 + 8/64 +
32/(64 · 256) bits.

Dettmers et al. 2023, arXiv 2305.14314 (QLoRA); Dettmers 2015, arXiv 1511.04561 (the dynamic map). Levels, blocks and
bytes are those of bitsandbytes.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.compression import layout
from minimoe.core.arrays import placeholder

BLOCK, NESTED_BLOCK = 64, 256
"""How many weights share a c, and how many c share a maximum."""


class Quantized(NamedTuple):
    """A matrix in 4 bits. R is the number of blocks."""

    codes: NDArray[np.uint8]  # (⌈n/2⌉,)  two weights a byte, the first in the high half
    absmax: NDArray[Any]  # (R,)  c in float32; with double quantisation its codes in uint8
    nested_absmax: NDArray[np.float32] | None  # (⌈R/256⌉,)  the largest |c − offset|
    offset: NDArray[np.float32] | None  # (1,)  the mean of c
    shape: tuple[int, int]  # (inputs, outputs)
    block: int = BLOCK


def _levels() -> NDArray[np.float32]:
    """Seven levels below zero, zero, and eight above zero: 16 in all. Both −1 and 1 are levels."""
    edge = (31 / 32 + 29 / 30) / 2  # so that the outermost quantile is finite
    above = [NormalDist().inv_cdf(p) for p in np.linspace(edge, 0.5, 9)[:-1]]
    below = [-NormalDist().inv_cdf(p) for p in np.linspace(edge, 0.5, 8)[:-1]]
    return (np.array(sorted([*above, 0.0, *below])) / max(above)).astype(np.float32)


def _dynamic_map() -> NDArray[np.float32]:
    """256 values in [−1, 1]: a sign, and 2^i steps in the decade that ends at 10^(i − 6), for i from 0 to 6."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1)
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*middles, *-middles]
    return np.array(sorted(values)).astype(np.float32)


LEVELS = _levels()
DYNAMIC_MAP = _dynamic_map()

ZERO = 7
"""The code of 0."""

LEVEL_ERROR = float(np.diff(LEVELS).max() / 2)
"""The largest distance of a number in [−1, 1] from its level: 0.152, between −1 and the level after it."""

MAP_ERROR = float(np.diff(DYNAMIC_MAP).max() / 2)
"""The largest distance of a number in [−0.993, 1] from its value in the map: 0.007."""


def quantize(w: NDArray[Any], block: int = BLOCK, double: bool = True) -> Quantized:
    """w (inputs, outputs) in float16 or float32 → its codes.

    |w − ŵ| ≤ 0.152 c in a block with maximum c. With ``double`` quantisation of c, the bound is larger by 0.0071 m,
    where m is the largest |c − offset| of 256 blocks.

    Raises:
        UserError: see ``layout.checked``; or the block size is not positive.
    """
    rows = layout.blocks(layout.checked(w), layout.checked_size(block, "block"), "constant")
    codes, absmax = _nearest(rows, LEVELS)
    flat = np.append(codes.reshape(-1)[: w.size], [ZERO] * (w.size % 2)).astype(np.uint8)
    packed = (flat[::2] << 4 | flat[1::2]).astype(np.uint8)
    single = absmax.astype(np.float32)
    shape = w.shape[0], w.shape[1]
    if not double:
        return Quantized(packed, single, None, None, shape, block)
    offset = single.mean(dtype=np.float64, keepdims=True).astype(np.float32)
    of_blocks = np.pad((single - offset).astype(np.float64), (0, -single.size % NESTED_BLOCK))
    nested, largest = _nearest(of_blocks.reshape(-1, NESTED_BLOCK), DYNAMIC_MAP)
    nested = nested.reshape(-1)[: single.size]
    return Quantized(packed, nested, largest.astype(np.float32), offset, shape, block)


def dequantize(q: Quantized) -> NDArray[np.float32]:
    """The matrix ŵ (inputs, outputs) in float32."""
    codes = np.stack([q.codes >> 4, q.codes & 15], axis=1).reshape(-1)[: q.shape[0] * q.shape[1]]
    values = np.pad(LEVELS[codes], (0, -codes.size % q.block)).reshape(-1, q.block)
    return layout.matrix(values * absmax_of(q)[:, None], q.shape)


def absmax_of(q: Quantized) -> NDArray[np.float32]:
    """The c of every block, (R,). If the c have been quantised too, they are computed from their codes."""
    if q.nested_absmax is None or q.offset is None:
        return q.absmax.astype(np.float32)
    return DYNAMIC_MAP[q.absmax] * np.repeat(q.nested_absmax, NESTED_BLOCK)[: q.absmax.size] + q.offset


def blank(shape: tuple[int, int], block: int = BLOCK, double: bool = True) -> Quantized:
    """A placeholder for the codes of a matrix of this shape: shapes and dtypes, no memory."""
    codes = placeholder((-(-shape[0] * shape[1] // 2),), np.uint8)
    count = layout.number_of_blocks(shape, block)
    if not double:
        return Quantized(codes, placeholder((count,), np.float32), None, None, shape, block)
    nested = placeholder((-(-count // NESTED_BLOCK),), np.float32)
    return Quantized(codes, placeholder((count,), np.uint8), nested, placeholder((1,), np.float32), shape, block)


def _nearest(rows: NDArray[np.float64], values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """rows (R, G), each divided by its largest number → the codes of the nearest ``values`` (R, G), and the divisors.

    The code of a number is the count of midpoints between values that are below the number, so the smaller code wins a
    tie.
    """
    absmax = np.abs(rows).max(1)
    scaled = rows / np.where(absmax > 0, absmax, 1)[:, None]  # a row of zeros stays a row of zeros
    midpoints = (values[:-1] + values[1:]) / 2
    return np.searchsorted(midpoints, scaled).astype(np.uint8), absmax
