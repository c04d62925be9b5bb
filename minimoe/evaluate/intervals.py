"""Confidence intervals: how far a measured number may be from the true one, because only a sample was measured.

    wilson                 a share, hits of n                       Wilson 1927, doi 10.1080/01621459.1927.10502953
    shares_apart           the difference of two shares             Newcombe 1998, Statistics in Medicine 17, p. 873
    answers_apart          the same, for answers to the same tasks  Newcombe 1998, Statistics in Medicine 17, p. 2635
    ratio, ratios_apart    Σ a / Σ b over pieces, by bootstrap      Efron 1979, doi 10.1214/aos/1176344552

All are 95 % intervals: of twenty such intervals, one misses the true value on average. Wilson's interval stays inside
[0, 1] and is not empty at 0 of n, unlike the textbook's p ± 2σ. The bootstrap repeatedly draws as many pieces as there
are, with replacement, and measures how much the number varies. With few pieces it varies too little, so Student's t
widens the interval (Hesterberg 2015, doi 10.1080/00031305.2015.1089789, section 3.2).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Z = 1.959964
"""95 % of a normal distribution lies within this many standard deviations of its mean."""

RESAMPLES = 2000
"""How often the bootstrap draws: enough for the second digit of a bound."""

FEWEST_PIECES = 5
"""With fewer pieces, drawing them again says nothing, so the bounds are NaN."""

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A number and the bounds around it; the bounds are NaN if there are too few pieces."""

    value: float
    low: float
    high: float


def wilson(hits: int, n: int) -> Interval:
    """The share ``hits`` / ``n`` with Wilson's interval; n is at least 1.

    centre ± half,   centre = (p + z²/2n) / (1 + z²/n),   half = z √(p(1−p)/n + z²/4n²) / (1 + z²/n)
    """
    p, widening = hits / n, 1 + Z * Z / n
    centre = (p + Z * Z / (2 * n)) / widening
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / widening
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half))


def shares_apart(one: Interval, other: Interval) -> Interval:
    """``one`` − ``other`` for two shares of independent samples, from Wilson's interval of each."""
    value = one.value - other.value
    return Interval(
        value,
        value - math.hypot(one.value - one.low, other.high - other.value),
        value + math.hypot(one.high - one.value, other.value - other.low),
    )


def answers_apart(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> Interval:
    """The share of right answers in ``one`` − that in ``other``, both (n,): marks on the same n ≥ 1 tasks.

    Tasks that are easy for both, or hard for both, say nothing about the difference. The correlation φ of the marks
    narrows the interval (Newcombe's method 10, with a continuity correction if it is positive):

        low = d − √(l₁² − 2φ l₁u₂ + u₂²),   high = d + √(u₁² − 2φ u₁l₂ + l₂²)

    d is the difference; l and u are the distances of Wilson's lower and upper bounds from each share.
    """
    n = len(one)
    first, second = wilson(int(one.sum()), n), wilson(int(other.sum()), n)
    both, one_only, other_only = (int(marks.sum()) for marks in (one & other, one & ~other, ~one & other))
    agreement: float = both * (n - both - one_only - other_only) - one_only * other_only
    if agreement > 0:
        agreement = max(agreement - n / 2, 0)
    spread = math.prod((int(one.sum()), n - int(one.sum()), int(other.sum()), n - int(other.sum())))
    phi = agreement / math.sqrt(spread) if spread else 0.0

    def side(mine: float, theirs: float) -> float:
        return math.sqrt(max(0.0, mine * mine - 2 * phi * mine * theirs + theirs * theirs))

    value = first.value - second.value
    return Interval(
        value,
        value - side(first.value - first.low, second.high - second.value),
        value + side(first.high - first.value, second.value - second.low),
    )


def ratio(parts: NDArray[Any], sizes: NDArray[Any], seed: int = 0) -> Interval:
    """Σ parts / Σ sizes over pieces, both (P,): for example, bits per byte."""
    return _bootstrap(np.asarray(parts, np.float64), np.asarray(sizes, np.float64), seed)


def ratios_apart(parts: NDArray[Any], others: NDArray[Any], sizes: NDArray[Any], seed: int = 0) -> Interval:
    """Σ parts / Σ sizes − Σ others / Σ sizes over the same pieces, all (P,).

    Some pieces are hard for every model. Each draw takes both models' results on a piece together, which removes this
    variation: the difference of two models is more certain than the number of either.
    """
    return _bootstrap(np.asarray(parts, np.float64) - others, np.asarray(sizes, np.float64), seed)


def _bootstrap(parts: Floats, sizes: Floats, seed: int) -> Interval:
    value = float(parts.sum() / sizes.sum())
    if len(parts) < FEWEST_PIECES:
        return Interval(value, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    at_once = 100  # bounds the memory
    drawn = (rng.integers(len(parts), size=(at_once, len(parts))) for _ in range(RESAMPLES // at_once))
    low, high = np.percentile([parts[i].sum(1) / sizes[i].sum(1) for i in drawn], [2.5, 97.5])
    # Few pieces vary too little: Student's t widens the interval, and √(P/(P−1)) makes the variance unbiased.
    wider = _student(len(parts) - 1) / Z * math.sqrt(len(parts) / (len(parts) - 1))
    return Interval(value, value - wider * (value - float(low)), value + wider * (float(high) - value))


def _student(freedom: int) -> float:
    """The counterpart of ``Z`` for Student's t, accurate to 0.3 % from 4 degrees of freedom on.

    Abramowitz and Stegun 1964, 26.7.5.
    """
    z = Z
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
