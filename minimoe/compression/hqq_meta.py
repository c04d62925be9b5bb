"""HQQ whose steps and offsets are quantised too, so that small groups cost less.

A step and an offset in float16 are 32 bits for each group: in groups of 16, two more bits for each weight. Here both
have 8 bits. Every 128 groups in turn share one interval for their steps and another for their offsets. An interval has
255 equal parts; its beginning and the length of a part are kept in float16:

    step ≈ low + part code,    offset ≈ low' + part' code'

With the codes of b bits in groups of G, a weight takes b + 16/G + 64/(128 G) bits: 3.03 for 2 bits in groups of 16.

The codes of the weights are computed at the end, with the step and the offset that are stored, so their errors are
taken into account. (The library of HQQ computes the codes before steps and offsets are quantised. It also keeps the
zero point −offset/step, which is large where a step is small, and lets groups share an interval although they are far
from each other in the matrix.)

Badri and Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.compression import hqq, layout, rtn
from minimoe.core.arrays import placeholder

SHARED = 128
"""How many groups share an interval for their steps, and another for their offsets."""

LARGEST = 255
"""The largest code of a step or an offset."""


class Quantized(NamedTuple):
    """A matrix in 2, 3 or 4 bits. R is the number of groups, M = ⌈R/128⌉."""

    codes: NDArray[Any]  # packed: see ``layout.pack``
    step: NDArray[np.uint8]  # (R,)
    step_low: NDArray[np.float16]  # (M,)
    step_part: NDArray[np.float16]  # (M,)
    offset: NDArray[np.uint8]  # (R,)
    offset_low: NDArray[np.float16]  # (M,)
    offset_part: NDArray[np.float16]  # (M,)
    shape: tuple[int, int]  # (inputs, outputs)
    bits: int


def quantize(w: NDArray[Any], bits: int = 2, group: int = 16) -> Quantized:
    """w (inputs, outputs) in float16 or float32 → its codes.

    A weight within [offset, offset + (2^bits − 1) step] is at most step/2 away from ŵ, with the offset and the step
    that are stored. For a weight outside this interval, the distance to the interval is added. If the largest and the
    smallest of 128 steps differ by s, each stored step is at most s/510 away from the step that ``hqq`` computes, apart
    from the rounding of float16; the same is true of offsets.

    Raises:
        UserError: as for ``rtn.quantize``.
    """
    plain = hqq.quantize(w, bits, group, np.float32)
    rows = rtn.grouped(w, bits, group, np.float16)
    made = Quantized(plain.codes, *_share(plain.step, np.inf), *_share(plain.offset, -np.inf), plain.shape, bits)
    kept = expanded(made)
    step, offset = (values[:, None].astype(np.float64) for values in (kept.step, kept.offset))
    codes = np.clip(np.rint((rows - offset) / step), 0, 2**bits - 1).astype(np.uint8)
    return made._replace(codes=layout.pack(codes, bits))


def dequantize(q: Quantized) -> NDArray[np.float32]:
    """The matrix ŵ (inputs, outputs) in float32."""
    return rtn.dequantize(expanded(q))


def expanded(q: Quantized) -> rtn.Quantized:
    """The same matrix with steps and offsets in float32."""
    step = _values(q.step, q.step_low, q.step_part)
    return rtn.Quantized(q.codes, step, _values(q.offset, q.offset_low, q.offset_part), q.shape, q.bits)


def blank(shape: tuple[int, int], bits: int = 2, group: int = 16) -> Quantized:
    """The codes of a matrix of this shape, without allocating memory."""
    count = layout.number_of_blocks(shape, group)
    each, shared = placeholder((count,), np.uint8), placeholder((-(-count // SHARED),), np.float16)
    codes = placeholder(layout.packed_shape(count, group, bits), layout.PACKINGS[bits].dtype)
    return Quantized(codes, each, shared, shared, each, shared, shared, shape, bits)


def _share(
    values: NDArray[np.float32], direction: float
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]]:
    """values (R,) → their codes, and the beginning and the part of each interval.

    The beginning is rounded in ``direction``. For steps this direction is up, because no weight can be divided by a
    step that was rounded to 0.
    """
    rows = np.pad(values.astype(np.float64), (0, -values.size % SHARED), "edge").reshape(-1, SHARED)
    low = rtn.towards(rows.min(1), direction, np.float16)
    part = rtn.towards(np.maximum(rows.max(1) - low, 0) / LARGEST, np.inf, np.float16)
    divisor = np.where(part > 0, part, 1).astype(np.float64)[:, None]  # 128 equal values all have the code 0
    codes = np.clip(np.rint((rows - low[:, None]) / divisor), 0, LARGEST).astype(np.uint8)
    return codes.reshape(-1)[: values.size], low, part


def _values(codes: NDArray[np.uint8], low: NDArray[np.float16], part: NDArray[np.float16]) -> NDArray[np.float32]:
    """What ``_share`` made of values (R,)."""
    beginning, each = (np.repeat(one.astype(np.float32), SHARED)[: codes.size] for one in (low, part))
    return beginning + codes * each
