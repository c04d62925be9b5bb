"""Checks of lesson 50: quantisation."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, values
from minimoe.exercises.feedback import Report, first_failure


def absmax_codes(answer: Answer) -> Report:
    """(w,) → codes (D, F) from −127 to 127 and c (F,), the largest |w| of each output."""
    rng = np.random.default_rng(50)
    plain, with_zeros = rng.standard_normal((2, 5, 3))
    plain[0] -= 2  # the largest weight of some column is negative
    with_zeros[:, 1] = 0
    return first_failure(_absmax_codes(answer, w) for w in (plain, with_zeros))


def _absmax_codes(answer: Answer, w: Array) -> Report:
    c = np.abs(w).max(0)
    scaled = 127 * w / np.where(c > 0, c, 1)
    right = np.rint(scaled).astype(int)
    codes = {
        "round to the nearest whole number; this cuts off what is behind the point.": np.trunc(scaled),
        "round to the nearest whole number; this always rounds down.": np.floor(scaled),
        "a code is a whole number: round it.": scaled,
        "the largest code is 127, not 128.": np.rint(scaled * 128 / 127),
        "each output has a c of its own; this uses one for the whole matrix.": np.rint(127 * w / np.abs(w).max()),
        "an output is a column of w; this takes the largest of each row.": np.rint(
            127 * w / np.abs(w).max(1, keepdims=True)
        ),
    }
    largest = {
        "the largest of |w|: a negative weight can be the largest.": w.max(0),
        "this is c/127, the step; return c.": c / 127,
        "this is 127/c; return c.": np.divide(127, c, out=np.full(c.shape, np.inf), where=c > 0),
    }
    return values(
        answer,
        (w,),
        {"codes": right, "c": c},
        sizes={"D": w.shape[0], "F": w.shape[1]},
        mistakes={"codes": _others(codes, right), "c": _others(largest, c)},
        reference="The definition",
    )


def normal_levels(answer: Answer) -> Report:
    """(bits,) → the 2^bits levels between −1 and 1, in ascending order, made of quantiles of a normal distribution."""
    return first_failure(_normal_levels(answer, bits) for bits in (3, 4))


def _normal_levels(answer: Answer, bits: int) -> Report:
    n = 2**bits
    outer, inner = 1 - 1 / (2 * n), 1 - 1 / (2 * (n - 1))

    def levels(edge: float, above: int = n // 2, below: int = n // 2 - 1) -> Array:
        quantile = NormalDist().inv_cdf
        high = [quantile(p) for p in np.linspace(edge, 0.5, above + 1)[:-1]]
        low = [-quantile(p) for p in np.linspace(edge, 0.5, below + 1)[:-1]]
        return np.array(sorted([*low, 0.0, *high]))

    edge = (outer + inner) / 2
    right = levels(edge) / levels(edge).max()
    wrong = {
        "divide by the largest level, so that the ends are −1 and 1.": levels(edge),
        "there is one level less below zero than above it; here it is the other way round.": -right[::-1],
        "these levels have equal distances; use quantiles of the normal distribution.": np.linspace(-1, 1, n),
        "this has one level too many: there is one less below zero than above it.": levels(edge, below=n // 2)
        / levels(edge).max(),
        "the level 0 is missing.": right[right != 0],
        "the edge is the mean of 1 − 1/(2n) and 1 − 1/(2(n − 1)).": levels(outer) / levels(outer).max(),
        "the edge is the mean of both fractions, not the second alone.": levels(inner) / levels(inner).max(),
        "the levels must ascend.": right[::-1],
    }
    return values(
        answer, (bits,), {"levels": right}, mistakes={"levels": _others(wrong, right)}, reference="The definition"
    )


def hqq_round(answer: Answer) -> Report:
    """(w, step, z, bits) → the zero point after one round of HQQ, with p = 0.7 and β = 10."""
    rng = np.random.default_rng(50)
    cases = ((0.9, 1.7, 2), (0.41, 6.4, 4))
    return first_failure(_hqq_round(answer, 3 * rng.standard_normal(12), *case) for case in cases)


def _hqq_round(answer: Answer, w: Array, step: float, z: float, bits: int) -> Report:
    last = 2**bits - 1

    def moved(clipped: bool = True, rounded: bool = True, power: float = -0.3, sign: int = 1, kept: float = 0) -> Array:
        q = w / step + z
        q = np.rint(q) if rounded else q
        q = np.clip(q, 0, last) if clipped else q
        error = w - (q - z) * step
        size = np.maximum(np.abs(error), 1e-300)
        e = kept * error + (1 - kept) * np.sign(error) * np.maximum(size - size**power / 10, 0)
        return q - (w - sign * e) / step

    right = moved().mean()
    q = np.clip(np.rint(w / step + z), 0, last)
    wrong = {
        f"a code is a whole number from 0 to {last}: clip it.": moved(clipped=False).mean(),
        "round the codes.": moved(rounded=False).mean(),
        "e is subtracted from w, not added.": moved(sign=-1).mean(),
        "this takes no error for an outlier: subtract e.": moved(sign=0).mean(),
        "if e is the whole error, z stays where it is: shrink it.": moved(kept=1).mean(),
        "the exponent is p − 1.": moved(power=0.7).mean(),
        "w − e must be divided by the step.": (q - (moved(kept=0) * -step + q * step)).mean(),
        "this is the sum over the group; z is the mean.": moved().sum(),
        "this is −z·step, the value of code 0; return z.": -right * step,
        "this is how far z moves; return the new z.": right - z,
    }
    return values(
        answer,
        (w, step, z, bits),
        {"z": right},
        sizes={"G": w.size},
        mistakes={"z": _others(wrong, right)},
        reference="The definition",
    )


def bits_per_weight(answer: Answer) -> Report:
    """(bits, group, meta_bits, meta_group) → bits of storage for each weight."""
    cases = ((2, 16, 8, 128), (3, 64, 8, 128), (4, 32, 6, 64))
    return first_failure(_bits_per_weight(answer, *case) for case in cases)


def _bits_per_weight(answer: Answer, bits: int, group: int, meta_bits: int, meta_group: int) -> Report:
    code = 3.2 if bits == 3 else bits
    shared = 32 / meta_group
    right = code + 2 * (meta_bits + shared) / group
    wrong = {
        "ten codes of 3 bits need the 32 bits of an integer.": bits + 2 * (meta_bits + shared) / group,
        "a group has two numbers, a step and a zero point; this counts one.": code + (meta_bits + shared) / group,
        "the numbers of 16 bits that the steps and zero points share are missing.": code + 2 * meta_bits / group,
        "what steps share is two numbers of 16 bits each.": code + 2 * (meta_bits + shared / 2) / group,
        "what is shared belongs to meta_group groups of weights.": code + 2 * (meta_bits / group + shared),
        "this is with a step and a zero point of 16 bits; here they have meta_bits.": code + 32 / group,
        "step and zero point are shared by the weights of a group.": code + 2 * (meta_bits + shared),
        "this counts only the codes.": float(code),
        "this is without the codes.": right - code,
    }
    return values(
        answer,
        (bits, group, meta_bits, meta_group),
        {"bits": right},
        mistakes={"bits": _others(wrong, np.asarray(right))},
        reference="The definition",
    )


def _others(wrong: dict[str, Any], right: Any) -> dict[str, Any]:
    """The wrong values that are not, in this case, right."""
    return {
        hint: value
        for hint, value in wrong.items()
        if np.shape(value) != np.shape(right) or not np.allclose(value, right)
    }
