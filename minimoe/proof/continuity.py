"""Does a function jump? The function is evaluated along a line, and the interval in which it changes most is halved
repeatedly.

Where a function is continuous, its change shrinks with the interval. At a jump the change stays, however short the
interval is. A router that chooses the k largest scores jumps wherever two experts change places; see lesson 21.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from minimoe.core.arrays import Array
from minimoe.core.errors import UserError

HALVINGS = 40
"""How often an interval is halved: a thousandth of the line shrinks to 10⁻¹⁵ of it."""


def largest_jump(function: Callable[[float], Array], points: int = 100, candidates: int = 5) -> float:
    """The largest jump of ``function`` on [0, 1], relative to the largest norm that it has there.

    The function is evaluated at ``points`` + 1 places. The ``candidates`` intervals with the largest changes are then
    halved repeatedly; each time, the half with the larger change is kept. The result is near 1e-9 or below for a
    continuous function.

    Raises:
        UserError: ``points`` or ``candidates`` is less than 1.
    """
    if points < 1 or candidates < 1:
        raise UserError(f"{points} points and {candidates} candidates are too few: give at least 1 of each.")
    places = np.linspace(0, 1, points + 1)
    values = [np.asarray(function(float(place)), dtype=np.float64) for place in places]
    scale = max(float(np.linalg.norm(value)) for value in values) or 1.0
    changes = [_apart(one, other) for one, other in zip(values[:-1], values[1:], strict=True)]
    jumps = []
    for start in np.argsort(changes)[::-1][:candidates]:
        low, high, at_low, at_high = places[start], places[start + 1], values[start], values[start + 1]
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            at_middle = np.asarray(function(float(middle)), dtype=np.float64)
            if _apart(at_low, at_middle) > _apart(at_middle, at_high):
                high, at_high = middle, at_middle
            else:
                low, at_low = middle, at_middle
        jumps.append(_apart(at_low, at_high))
    return max(jumps) / scale


def _apart(one: Array, other: Array) -> float:
    return float(np.linalg.norm(one - other))
