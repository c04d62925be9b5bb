"""Jumps are found and measured; kinks and steep places are none."""

from collections.abc import Callable

import numpy as np
import pytest

from minimoe.core.errors import UserError
from minimoe.proof import continuity


@pytest.mark.parametrize(
    ("function", "jump"),
    [
        (lambda t: np.array([np.sin(9 * t), t]), 0.0),
        (lambda t: np.array([abs(t - 0.37)]), 0.0),
        (lambda t: np.array([np.tanh(200 * (t - 0.4))]), 0.0),
        (lambda t: np.array([3.0, 4.0 * (t > 0.123)]), 4 / 5),
        (lambda t: np.array([t + 0.25 * (t > 0.7)]), 0.25 / 1.25),
        (lambda t: np.zeros(2), 0.0),
    ],
)
def test_a_jump_is_found_and_measured(function: Callable[[float], np.ndarray], jump: float) -> None:
    assert continuity.largest_jump(function) == pytest.approx(jump, abs=1e-8)


def test_the_largest_of_several_jumps_counts() -> None:
    steps = continuity.largest_jump(lambda t: np.array([(t > 0.2) + 3 * (t > 0.6) + 2 * (t > 0.9)], float))
    assert steps == pytest.approx(3 / 6)


def test_no_points_are_refused() -> None:
    with pytest.raises(UserError, match="0 points"):
        continuity.largest_jump(lambda t: np.zeros(1), points=0)
