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

ROUNDING = 1e-12
"""The largest relative error of a whole number that was computed in floating point."""


def error(got: Array, want: Array) -> float:
    """max |got − want|, relative to the largest |want|."""
    largest = float(np.abs(want).max(initial=0.0)) or 1.0
    return float(np.abs(got - want).max(initial=0.0)) / largest


def close(got: Array, want: Array) -> bool:
    return got.shape == want.shape and error(got, want) <= TOLERANCE


def equal(got: Array, want: Array) -> Array:
    """Where whole numbers are equal; a whole number that was computed in floating point may be off by rounding."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.abs(got.astype(np.float64) - want) <= ROUNDING * np.maximum(np.abs(want), 1)


def wrong_shape(got: Array, want: Array, sizes: Mapping[str, int]) -> str:
    """A sentence about an array whose shape is not the expected one."""
    what = f"it has shape {got.shape}, expected {named_shape(want.shape, sizes)}"
    if not want.ndim:
        what = f"it is an array of shape {got.shape}, expected a number"
    if got.ndim == want.ndim and got.shape == want.shape[::-1]:
        return f"{what}: it looks transposed."
    if got.size == want.size:
        if close(got.reshape(want.shape), want):
            return f"{what}: the values are right, but a reshape or an index is missing, or a `keepdims` is too much."
        return f"{what}: check each reshape, transpose and `keepdims`."
    for axis in range(got.ndim):
        if got.ndim == want.ndim + 1 and close(got.sum(axis), want):
            return f"{what}: it must still be summed over {_axis_name(got.shape, axis, sizes)}."
    if got.ndim > want.ndim:
        return f"{what}: it has too many axes. Which axis should be summed over?"
    if got.ndim < want.ndim:
        return f"{what}: an axis is missing. Did you sum over it?"
    return f"{what}."


def wrong_values(got: Array, want: Array, sizes: Mapping[str, int], share: bool = False) -> str:
    """A sentence about a result of the right shape whose values are wrong; a ``share`` lies between 0 and 1."""
    got, want = got.astype(np.float64), want.astype(np.float64)  # integers could overflow in squares
    if not np.isfinite(got).all():
        return f"it {'contains numbers that are' if want.ndim else 'is'} not finite."
    if not got.any():
        return "it is zero everywhere." if want.ndim else "it is zero."
    return (
        (_outside(got, want) if share else "")
        or _constant_factor(got, want, sizes)
        or _transposed(got, want)
        or _nearly(got, want)
        or _offset_by_axis(got, want)
        or _factor_by_axis(got, want)
        or _too_large_or_small(got, want)
        or _misplaced_zeros(got, want)
        or _partly_right(got, want)
        or "the shape is right, but none of the values are."
    )


def named_shape(shape: tuple[int, ...], sizes: Mapping[str, int]) -> str:
    """(4, 6) → "(N, D) = (4, 6)", if every size has a name."""
    names = {size: name for name, size in sizes.items()}
    if not shape or not all(size in names for size in shape):
        return str(shape)
    comma = "," if len(shape) == 1 else ""
    return f"({', '.join(names[size] for size in shape)}{comma}) = {shape}"


def _outside(got: Array, want: Array) -> str:
    """About a share or probability that is not between 0 and 1."""
    if close(got / 100, want):
        return "this is in per cent: give a share between 0 and 1."
    if got.min() >= -TOLERANCE and got.max() <= 1 + TOLERANCE:
        return ""
    found = f"values from {got.min():.3g} to {got.max():.3g}" if got.ndim else f"{got:.3g}"
    return (
        f"it must lie between 0 and 1, but here it has {found}."
        if got.ndim
        else (f"it must lie between 0 and 1, but it is {found}.")
    )


def _constant_factor(got: Array, want: Array, sizes: Mapping[str, int]) -> str:
    if not want.any():
        return ""
    factor = float((got * want).sum() / np.square(want).sum())
    if factor == 0 or not close(got / factor, want):
        return ""
    what = "every value" if want.ndim else "it"
    if math.isclose(factor, -1, rel_tol=5e-4):
        return "it has the wrong sign everywhere." if want.ndim else "it has the wrong sign."
    if math.isclose(factor, 1, rel_tol=5e-4):  # a small error, not a factor: an ε, for example
        return ""
    sign = " and has the wrong sign" if factor < 0 else ""
    for direction, ratio in (("large", abs(factor)), ("small", 1 / abs(factor))):
        for named in (_sizes(sizes), _from_sizes(sizes, want)):
            names = [name for size, name in named if math.isclose(ratio, size, rel_tol=1e-5)]
            if names:
                return f"{what} is {ratio:g} times too {direction}{sign}, and {ratio:g} is {' or '.join(names)}."
        if want.ndim and math.isclose(ratio, 2, rel_tol=1e-5):
            return f"{what} is 2 times too {direction}{sign}."
    if want.size == 1:  # any number is a multiple of any other
        return ""
    return f"{what} is {factor:.4g} times what it should be: a constant factor is wrong."


def _sizes(sizes: Mapping[str, int]) -> list[tuple[float, str]]:
    return [(size, name) for name, size in sizes.items() if size > 1]


def _from_sizes(sizes: Mapping[str, int], want: Array) -> Iterator[tuple[float, str]]:
    """Roots, products and quotients of the sizes; none where many numbers are multiples of each other by accident."""
    if not want.ndim and float(want).is_integer():
        return
    for size, name in _sizes(sizes):
        if not math.sqrt(size).is_integer():
            yield math.sqrt(size), f"√{name}"
        for factor, other in _sizes(sizes):
            if name < other:
                yield size * factor, f"{name}·{other}"
            if size > 2 * factor:
                yield size / factor, f"{name}/{other}"


def _transposed(got: Array, want: Array) -> str:
    if got.ndim >= 2 and got.shape[-1] == got.shape[-2] and close(got.swapaxes(-1, -2), want):
        return "it is the transpose of what it should be."
    if got.size > 2 and close(np.sort(got, axis=None), np.sort(want, axis=None)):
        return "the numbers are right, but they are in the wrong places."
    return ""


def _offset_by_axis(got: Array, want: Array) -> str:
    difference = got - want
    if got.size > 2 and close(np.full_like(got, difference.mean()) + want, got):
        return f"every value is off by the same constant, {difference.mean():.3g}."
    for axis, line in _lines(got):
        if close(np.broadcast_to(difference.mean(axis, keepdims=True), got.shape) + want, got):
            return (
                f"every {line} is off by its own constant: a term that is summed over the {line} is missing or wrong."
            )
    return ""


def _factor_by_axis(got: Array, want: Array) -> str:
    for axis, line in _lines(got):
        square = np.square(want).sum(axis, keepdims=True)
        factor = (got * want).sum(axis, keepdims=True) / np.where(square > 0, square, 1)
        if (square > 0).all() and factor.all() and close(factor * want, got):
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


def _too_large_or_small(got: Array, want: Array) -> str:
    """About a single number, of which nothing else is known."""
    if want.ndim:
        return ""
    return f"it is {got:.6g}, which is too {'large' if got > want else 'small'}."


def _misplaced_zeros(got: Array, want: Array) -> str:
    """About zeros that should not be there, or that are missing."""
    right = _right(got, want)
    absent, extra = (got == 0) & ~right, (want == 0) & ~right
    if absent.any() and (right | absent).all():
        return f"{_entries(absent)} zero and must not be, the first at {_first(absent)}; the others are right."
    if extra.any() and (right | extra).all():
        return f"{_entries(extra)} not zero and must be, the first at {_first(extra)}; the others are right."
    if (right == (want == 0)).all() and right.any() and not (got[~right] == 0).any():
        return "the zeros are in the right places, but none of the other values are right."
    return ""


def _partly_right(got: Array, want: Array) -> str:
    """How many entries are right; a zero that is right by accident proves nothing, so zeros do not count."""
    right = _right(got, want)
    counted = want != 0
    if not (right & counted).any():
        return ""
    others = "" if counted.all() else " that are not zero"
    return (
        f"{int((right & counted).sum())} of {int(counted.sum())} entries{others} are right; "
        f"the first wrong one is at {_first(~right)}."
    )


def _right(got: Array, want: Array) -> Array:
    result: Array = np.abs(got - want) <= TOLERANCE * (np.abs(want).max() or 1.0)
    return result


def _entries(where: Array) -> str:
    count = int(where.sum())
    return "1 entry is" if count == 1 else f"{count} entries are"


def _first(where: Array) -> list[int]:
    return [int(i) for i in np.argwhere(where)[0]]


def _axis_name(shape: tuple[int, ...], axis: int, sizes: Mapping[str, int]) -> str:
    names = [name for name, size in sizes.items() if size == shape[axis]]
    return f"{names[0]} (axis {axis})" if names else f"axis {axis}"
