"""Round to nearest: each group of weights has an interval of its own, cut into 2^bits − 1 equal steps.

    step = (max − min) / (2^bits − 1),    q = round((w − min) / step),    w ≈ q step + min

This is the plain asymmetric quantiser that every other method is compared with. Other programs write it as (q − z) step
with the zero point z = −min/step.

Minimum and step are kept in float16, 32 bits for each group. Before the weights are rounded, the minimum is rounded
down and the step up, so the interval still holds every weight, and no code has to be clipped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from minimoe.compression import layout
from minimoe.core.arrays import placeholder
from minimoe.core.errors import UserError


class Quantized(NamedTuple):
    """A matrix in 2, 3 or 4 bits. R is the number of groups."""

    codes: NDArray[Any]  # packed: see ``layout.pack``
    step: NDArray[Any]  # (R,)
    offset: NDArray[Any]  # (R,)  the value of code 0
    shape: tuple[int, int]  # (inputs, outputs)
    bits: int


def quantize(w: NDArray[Any], bits: int = 4, group: int = 64, dtype: DTypeLike = np.float16) -> Quantized:
    """w (inputs, outputs) in float16 or float32 → its codes, with |w − ŵ| ≤ step/2 for each weight.

    ``dtype`` is the type of step and offset.

    Raises:
        UserError: see ``layout.checked``; the bits are not 2, 3 or 4; the group size is not positive; or a weight is
            larger than half of what ``dtype`` can hold.
    """
    rows = grouped(w, bits, group, dtype)
    offset = towards(rows.min(1), -np.inf, dtype)
    step = step_of(rows.max(1) - offset, bits, dtype)
    codes = np.rint((rows - offset[:, None]) / step[:, None].astype(np.float64)).astype(np.uint8)
    return Quantized(layout.pack(codes, bits), step, offset, (w.shape[0], w.shape[1]), bits)


def dequantize(q: Quantized) -> NDArray[np.float32]:
    """The matrix ŵ (inputs, outputs) in float32."""
    codes = layout.unpack(q.codes, q.bits, len(q.step))
    return layout.matrix(codes * q.step[:, None].astype(np.float32) + q.offset[:, None].astype(np.float32), q.shape)


def blank(shape: tuple[int, int], bits: int = 4, group: int = 64, dtype: DTypeLike = np.float16) -> Quantized:
    """The codes of a matrix of this shape, without allocating memory."""
    count = layout.number_of_blocks(shape, group)
    codes = placeholder(layout.packed_shape(count, group, bits), layout.PACKINGS[bits].dtype)
    return Quantized(codes, placeholder((count,), dtype), placeholder((count,), dtype), shape, bits)


def grouped(w: NDArray[Any], bits: int, group: int, dtype: DTypeLike) -> NDArray[np.float64]:
    """w (inputs, outputs) → its groups (R, G), after the checks that ``quantize`` promises."""
    if bits not in layout.PACKINGS:
        raise UserError(f"bits {bits} is not possible: choose one of {', '.join(map(str, layout.PACKINGS))}.")
    rows = layout.blocks(layout.checked(w), layout.checked_size(group, "group"), "edge")
    largest, limit = float(np.abs(rows).max()), float(np.finfo(dtype).max) / 2  # an offset may be beyond the weights
    if largest > limit:
        raise UserError(
            f"a weight has the size {largest:g}, expected at most {limit:g}, because {np.dtype(dtype).name} must hold "
            "the ends of its group: use int8 or nf4."
        )
    return rows


def step_of(span: NDArray[np.float64], bits: int, dtype: DTypeLike) -> NDArray[Any]:
    """The step (R,) that divides intervals of these lengths; 1 where the length is 0, so that the code is 0.

    The step is rounded up, so that the last code is not below the end of the interval.
    """
    step = towards(span / (2**bits - 1), np.inf, dtype)
    return np.where(step > 0, step, np.ones_like(step))


def towards(values: NDArray[np.float64], direction: float, dtype: DTypeLike) -> NDArray[Any]:
    """``values`` in ``dtype``, each rounded in the ``direction`` of −∞ or ∞."""
    near = values.astype(dtype)
    past = near < values if direction > 0 else near > values
    return np.where(past, np.nextafter(near, np.asarray(direction, dtype)), near)
