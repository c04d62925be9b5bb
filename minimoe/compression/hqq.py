"""Half-quadratic quantisation: round to nearest, with an offset for each group that tolerates large errors in a few
weights.

Plain rounding chooses an interval that contains the largest weights of a group. Here the step is the same, but the zero
point z (w is near (q − z) step) is moved to make Σ |w − ŵ|^p small. With p = 0.7 < 1, outliers have little effect on
this error:

    ŵ = (q − z) step,    e = shrink(w − ŵ),    z = mean of q − (w − e)/step over the group
    shrink(r) = sign(r) max(|r| − |r|^(p−1)/β, 0),    β = 10

e holds the errors that look like outliers. For fixed e, the problem is quadratic, and z is its exact solution. The
iteration ends after 20 rounds, or when the mean of |w − ŵ| over the matrix does not fall. No calibration text is
needed.

With this β an error below 0.1^(1/1.3) = 0.17 is never taken for an outlier, whatever the step. If all errors are below
this limit, z only moves to where the errors of each group add up to zero.

Badri and Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models. In their write-up, β grows by 1 % in
each round; in their library, β stays the same. This module follows the library and gives the same codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from minimoe.compression import layout, rtn
from minimoe.compression.rtn import Quantized, blank, dequantize

__all__ = ["Quantized", "blank", "dequantize", "quantize"]

POWER, BETA, ROUNDS = 0.7, 10.0, 20


def quantize(w: NDArray[Any], bits: int = 4, group: int = 64, dtype: DTypeLike = np.float16) -> Quantized:
    """w (inputs, outputs) in float16 or float32 → its codes.

    A weight within [offset, offset + (2^bits − 1) step] is at most step/2 away from ŵ. A weight outside this interval
    is rounded to its nearest end, so the distance to the interval is added to the error. ``dtype`` is the type of step
    and offset. With 4 bits, z starts at a whole number, as in the library.

    Raises:
        UserError: as for ``rtn.quantize``.
    """
    rows = rtn.grouped(w, bits, group, dtype)
    low, high, last = rows.min(1, keepdims=True), rows.max(1, keepdims=True), 2**bits - 1
    kept = rtn.step_of((high - low)[:, 0], bits, dtype)
    step = kept[:, None].astype(np.float64)
    z = -low / step
    z = np.rint(z) if bits == 4 else z
    best = np.inf
    for _ in range(ROUNDS):
        q = np.clip(np.rint(rows / step + z), 0, last)
        error = rows - (q - z) * step
        z = (q - (rows - shrink(error)) / step).mean(1, keepdims=True)
        mean = np.abs(error).mean()
        if mean >= best:
            break
        best = mean
    offset = (-z * step)[:, 0].astype(dtype)
    codes = np.clip(np.rint((rows - offset[:, None]) / step), 0, last).astype(np.uint8)
    return Quantized(layout.pack(codes, bits), kept, offset, (w.shape[0], w.shape[1]), bits)


def shrink(error: NDArray[np.float64]) -> NDArray[np.float64]:
    """The part of each error that is taken for an outlier: nothing of a small one, nearly all of a large one."""
    size = np.abs(error)
    positive = np.where(size > 0, size, 1)  # |0|^(p−1) is infinite, and an error of 0 has no outlier
    return np.where(size > 0, np.sign(error) * np.maximum(size - positive ** (POWER - 1) / BETA, 0), 0)
