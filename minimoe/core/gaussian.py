"""The normal distribution on arrays: its density φ and its cumulative distribution Φ.

NumPy has no error function, so one is interpolated here, at import, from Python's ``math.erfc``:

    erfc(x) = exp(−x²) · P(t),    t = 1 / (1 + x/3),    0 ≤ x ≤ 6

exp(x²)·erfc(x) is so smooth in t that a Chebyshev series P of degree 18 is accurate to 1e-14 everywhere.
"""

from __future__ import annotations

import math

import numpy as np

from minimoe.core.arrays import Array, array_module, underflow_is_right

_FURTHEST = 6.0  # erfc(6) is 2e-17: beyond it, Φ is 0 or 1 to the last digit
_T_MIN = 1 / (1 + _FURTHEST / 3)


def _scaled_erfc(t: np.ndarray) -> np.ndarray:
    """exp(x²)·erfc(x), as a function of t."""
    x = np.minimum(3 * (1 / t - 1), _FURTHEST)
    return np.array([math.exp(v * v) * math.erfc(v) for v in x])


_SERIES: list[float] = np.polynomial.Chebyshev.interpolate(_scaled_erfc, 18, [_T_MIN, 1.0]).coef.tolist()


@underflow_is_right
def density(z: Array) -> Array:
    """φ(z) = exp(−z²/2) / √(2π), any shape."""
    xp = array_module(z)
    return xp.exp(-0.5 * xp.square(z)) * (1 / math.sqrt(2 * math.pi))


@underflow_is_right
def cumulative(z: Array) -> Array:
    """Φ(z), the probability that a standard normal number is at most z; any shape, absolute error below 1e-14."""
    xp = array_module(z)
    x = xp.minimum(xp.abs(z) * math.sqrt(0.5), _FURTHEST)
    t = 1 / (1 + x / 3)
    u = (2 * t - (1 + _T_MIN)) * (1 / (1 - _T_MIN))  # t mapped to [−1, 1]
    above, here = xp.zeros_like(u), xp.zeros_like(u)
    for coefficient in reversed(_SERIES[1:]):  # Clenshaw's recurrence: Σ cₖ·Tₖ(u) without the polynomials Tₖ
        above, here = here, 2 * u * here - above + coefficient
    half_erfc = 0.5 * xp.exp(-x * x) * (u * here - above + _SERIES[0])
    return xp.where(z > 0, 1 - half_erfc, half_erfc)
