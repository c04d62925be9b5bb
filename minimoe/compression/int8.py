"""Eight bits: each output column of a matrix is divided by its largest weight and rounded to whole numbers up to 127.

    c = max |w| over the inputs of an output,    q = round(127 w / c),    w ≈ q c / 127

A product of two int8 matrices is exact in whole numbers. ``matmul`` quantises the rows of x in the same way. In large
language models, a few columns of x are much larger than the others. One large number in a row would leave few codes for
the rest of the row, so these few columns are multiplied in floating point.

Dettmers et al. 2022, arXiv 2208.07339 (LLM.int8).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.compression import layout
from minimoe.core.arrays import placeholder

LARGEST = 127
"""The largest code; −128 is not used, so that the codes are symmetric."""

THRESHOLD = 6.0
"""A column of x with a number of at least this size is an outlier."""


class Quantized(NamedTuple):
    """A matrix in 8 bits."""

    codes: NDArray[np.int8]  # (inputs, outputs)
    absmax: NDArray[np.float32]  # (outputs,)  c


def quantize(w: NDArray[Any]) -> Quantized:
    """w (inputs, outputs) in float16 or float32 → its codes, with |w − ŵ| ≤ c/254 in a column with maximum c.

    Raises:
        UserError: see ``layout.checked``.
    """
    codes, absmax = _by_column(layout.checked(w))
    return Quantized(codes, absmax.astype(np.float32))


def dequantize(q: Quantized) -> NDArray[np.float32]:
    """The matrix ŵ (inputs, outputs) in float32."""
    return q.codes * (q.absmax / np.float32(LARGEST))


def blank(shape: tuple[int, int]) -> Quantized:
    """The codes of a matrix of this shape, without allocating memory."""
    return Quantized(placeholder(shape, np.int8), placeholder(shape[1:], np.float32))


def matmul(x: NDArray[Any], q: Quantized, threshold: float = THRESHOLD) -> NDArray[Any]:
    """x (N, inputs), finite → x ŵ (N, outputs) in the type of x, with x in 8 bits too, except its outlier columns.

    An outlier column is multiplied by dequantised weights, so of the two factors only x is exact there.

    With c_x the largest number of a row of x outside the outlier columns, the codes of x add an error of at most
    (c_x/254) Σ |ŵ| over the inputs outside these columns.
    """
    outlier = (np.abs(x) >= threshold).any(0)  # (inputs,)
    codes, absmax = _by_column(np.where(outlier, 0, x).T.astype(np.float64))
    # float64 holds every whole number up to 2^53, so this product is exact, and BLAS computes it
    whole = codes.T.astype(np.float64) @ q.codes.astype(np.float64)
    y = whole * absmax[:, None] * (q.absmax / LARGEST**2)
    y += x[:, outlier].astype(np.float64) @ dequantize(q._replace(codes=q.codes[outlier]))
    return y.astype(x.dtype)


def _by_column(w: NDArray[np.float64]) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    absmax = np.abs(w).max(0)
    # a column of zeros has only the code 0, whatever it is divided by
    return np.rint(w * (LARGEST / np.where(absmax > 0, absmax, 1))).astype(np.int8), absmax
