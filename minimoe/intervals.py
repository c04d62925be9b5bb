"""Confidence intervals: how far a measured number could be from the true one, by the luck of what was measured.

    wilson                 a share, hits of n                       Wilson 1927, doi 10.1080/01621459.1927.10502953
    shares_apart           the difference of two shares             Newcombe 1998, Statistics in Medicine 17, p. 873
    ratio, ratios_apart    Σ a / Σ b over pieces, by bootstrap      Efron 1979, doi 10.1214/aos/1176344552

All are for 95 %: of twenty such intervals, one misses the truth. Wilson's stays inside [0, 1] and is not empty at 0 of
n, where the textbook's p ± 2σ is. The bootstrap draws as many pieces as there are, with replacement, again and again,
and asks how much the number moves.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Z = 1.959964
"""Standard deviations to either side that hold 95 % of a normal distribution."""

RESAMPLES = 2000
"""Times that the bootstrap draws: enough for the second digit of a bound."""

FEWEST_PIECES = 5
"""With fewer, drawing the same ones again says nothing."""

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A number and the bounds around it; the bounds are NaN where there is too little to say."""

    value: float
    low: float
    high: float


def wilson(hits: int, n: int) -> Interval:
    """The share ``hits`` / ``n``, n at least 1.

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


def ratio(parts: NDArray[Any], sizes: NDArray[Any], seed: int = 0) -> Interval:
    """Σ parts / Σ sizes over pieces, both (P,): bits over bytes, say."""
    return _bootstrap(np.asarray(parts, np.float64), np.asarray(sizes, np.float64), seed)


def ratios_apart(parts: NDArray[Any], others: NDArray[Any], sizes: NDArray[Any], seed: int = 0) -> Interval:
    """Σ parts / Σ sizes − Σ others / Σ sizes over the same pieces, all (P,).

    Some pieces are hard for everyone. Drawing both models' results on a piece together takes that out, so that the
    difference of two models is known better than the number of either.
    """
    return _bootstrap(np.asarray(parts, np.float64) - others, np.asarray(sizes, np.float64), seed)


def _bootstrap(parts: Floats, sizes: Floats, seed: int) -> Interval:
    value = float(parts.sum() / sizes.sum())
    if len(parts) < FEWEST_PIECES:
        return Interval(value, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    at_once = 100  # which bounds the memory
    drawn = (rng.integers(len(parts), size=(at_once, len(parts))) for _ in range(RESAMPLES // at_once))
    low, high = np.percentile([parts[i].sum(1) / sizes[i].sum(1) for i in drawn], [2.5, 97.5])
    return Interval(value, float(low), float(high))
