"""What is wrong with an array, in one sentence: the mistakes that look the same in every lesson.

This module knows only patterns that can be seen from the two arrays: a constant factor, a missing sum, a transpose. The
check of a lesson knows the mistakes in its own formulas, such as a forgotten term.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from minimoe.core.arrays import Array

TOLERANCE = 1e-6
"""The largest error that counts as equal: far above rounding, far below any mistake."""


def error(got: Array, want: Array) -> float:
    """max |got − want|, relative to the largest |want|."""
    largest = float(np.abs(want).max(initial=0.0)) or 1.0
    return float(np.abs(got - want).max(initial=0.0)) / largest


def close(got: Array, want: Array) -> bool:
    return got.shape == want.shape and error(got, want) <= TOLERANCE


def wrong_shape(got: Array, want: Array, sizes: Mapping[str, int]) -> str:
    """A sentence about an array whose shape is not the expected one."""
    what = f"it has shape {got.shape}, expected {named_shape(want.shape, sizes)}"
    if got.ndim == want.ndim and got.shape == want.shape[::-1]:
        return f"{what}: it looks transposed."
    if got.size == want.size:
        return f"{what}: the number of entries is right, so a reshape, a transpose or a keepdims is wrong or missing."
    for axis in range(got.ndim):
        if got.ndim == want.ndim + 1 and close(got.sum(axis), want):
            return f"{what}: it must still be summed over {_axis_name(got.shape, axis, sizes)}."
    if got.ndim > want.ndim:
        return f"{what}: it has too many axes. Which axis should be summed over?"
    if got.ndim < want.ndim:
        return f"{what}: an axis is missing. Did you sum over it?"
    return f"{what}."


def wrong_values(got: Array, want: Array, sizes: Mapping[str, int]) -> str:
    """A sentence about an array of the right shape whose values are wrong; empty if no pattern is found."""
    got, want = got.astype(np.float64), want.astype(np.float64)  # integers could overflow in squares
    if not np.isfinite(got).all():
        return "it contains numbers that are not finite."
    if not got.any():
        return "it is zero everywhere."
    return (
        _constant_factor(got, want, sizes)
        or _transposed(got, want)
        or _offset_by_axis(got, want)
        or _factor_by_axis(got, want)
        or _nearly(got, want)
        or _partly_right(got, want)
    )


def named_shape(shape: tuple[int, ...], sizes: Mapping[str, int]) -> str:
    """(4, 6) → "(N, D) = (4, 6)", if every size has a name."""
    names = {size: name for name, size in sizes.items()}
    if not shape or not all(size in names for size in shape):
        return str(shape)
    comma = "," if len(shape) == 1 else ""
    return f"({', '.join(names[size] for size in shape)}{comma}) = {shape}"


def _constant_factor(got: Array, want: Array, sizes: Mapping[str, int]) -> str:
    if not want.any():
        return ""
    factor = float((got * want).sum() / np.square(want).sum())
    if factor == 0 or not close(got / factor, want):
        return ""
    if math.isclose(factor, -1, rel_tol=1e-5):
        return "it has the wrong sign everywhere."
    sign = " and has the wrong sign" if factor < 0 else ""
    if want.size == 1:  # any number is a multiple of any other
        return ""
    for value, name in _usual_factors(sizes):
        if math.isclose(abs(factor), value, rel_tol=1e-5):
            return f"every value is {value:g} times too large{sign}, {name}."
        if math.isclose(abs(factor), 1 / value, rel_tol=1e-5):
            return f"every value is {value:g} times too small{sign}, {name}."
    return f"every value is {factor:.4g} times what it should be: a constant factor is wrong."


def _usual_factors(sizes: Mapping[str, int]) -> Iterator[tuple[float, str]]:
    """The usual wrong factors, each with a possible cause."""
    yield 2, "as in the derivative of a square"
    for name, size in sizes.items():
        if size > 1:
            yield size, f"and {size} is {name}"
            yield math.sqrt(size), f"and {math.sqrt(size):g} is √{name}"
    for name, size in sizes.items():
        for other, factor in sizes.items():
            if name < other:
                yield size * factor, f"and {size * factor} is {name}·{other}"


def _transposed(got: Array, want: Array) -> str:
    if got.ndim >= 2 and got.shape[-1] == got.shape[-2] and close(got.swapaxes(-1, -2), want):
        return "it is the transpose of what it should be."
    if got.size > 2 and close(np.sort(got, axis=None), np.sort(want, axis=None)):
        return "the numbers are right, but they are in the wrong places."
    return ""


def _offset_by_axis(got: Array, want: Array) -> str:
    difference = got - want
    for axis, line in _lines(got):
        if close(np.broadcast_to(difference.mean(axis, keepdims=True), got.shape) + want, got):
            return (
                f"every {line} is off by its own constant: a term that is summed over the {line} is missing or wrong."
            )
    return ""


def _factor_by_axis(got: Array, want: Array) -> str:
    for axis, line in _lines(got):
        square = np.square(want).sum(axis, keepdims=True)
        if (square > 0).all() and close((got * want).sum(axis, keepdims=True) / square * want, got):
            return f"every {line} is right except for its own constant factor."
    return ""


def _lines(x: Array) -> list[tuple[int, str]]:
    """The axes along which a mistake can be constant, each with the word for a line of entries along it."""
    return [(axis, line) for axis, line in ((-1, "row"), (-2, "column")) if x.ndim >= 2 and x.shape[axis] > 2]


def _nearly(got: Array, want: Array) -> str:
    if error(got, want) < 1e-3:
        return (
            "it is nearly right, so no term is missing: look for a float32 among float64, an ε in the wrong place, "
            "or an approximation."
        )
    return ""


def _partly_right(got: Array, want: Array) -> str:
    right = np.abs(got - want) <= TOLERANCE * (np.abs(want).max() or 1.0)
    if not right.any():
        return ""
    first = [int(i) for i in np.argwhere(~right)[0]]
    return f"{int(right.sum())} of {right.size} entries are right; the first wrong one is at {first}."


def _axis_name(shape: tuple[int, ...], axis: int, sizes: Mapping[str, int]) -> str:
    names = [name for name, size in sizes.items() if size == shape[axis]]
    return f"{names[0]} (axis {axis})" if names else f"axis {axis}"
