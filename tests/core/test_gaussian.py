"""φ and Φ against Python's own error function."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core import gaussian


@given(z=st.lists(st.floats(-40, 40), min_size=1, max_size=50))
def test_the_cumulative_distribution_agrees_with_erfc(z: list[float]) -> None:
    expected = [0.5 * math.erfc(-value / math.sqrt(2)) for value in z]
    np.testing.assert_allclose(gaussian.cumulative(np.array(z)), expected, rtol=0, atol=1e-14)


def test_the_cumulative_distribution_agrees_with_erfc_on_a_fine_grid() -> None:
    z = np.linspace(-9, 9, 20_001)
    expected = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in z])
    assert abs(gaussian.cumulative(z) - expected).max() < 1e-14


@given(z=st.floats(-40, 40))
def test_both_tails_sum_to_one(z: float) -> None:
    assert gaussian.cumulative(np.array([z]))[0] + gaussian.cumulative(np.array([-z]))[0] == pytest.approx(1, abs=1e-15)


def test_the_density_is_the_slope_of_the_cumulative_distribution() -> None:
    z, h = np.linspace(-7, 7, 1001), 1e-3
    slope = 8 * (gaussian.cumulative(z + h) - gaussian.cumulative(z - h))
    slope -= gaussian.cumulative(z + 2 * h) - gaussian.cumulative(z - 2 * h)
    np.testing.assert_allclose(gaussian.density(z), slope / (12 * h), atol=2e-11)


def test_extremes_are_right_and_raise_no_warning() -> None:
    z = np.array([-1e6, -40.0, 0.0, 40.0, 1e6])
    np.testing.assert_allclose(gaussian.cumulative(z), [0, 0, 0.5, 1, 1], atol=1e-16)
    np.testing.assert_allclose(gaussian.density(z), [0, 0, 1 / math.sqrt(2 * math.pi), 0, 0], atol=1e-16)


def test_float32_stays_float32_and_any_shape_stays_as_it_is() -> None:
    z = np.linspace(-4, 4, 12, dtype=np.float32).reshape(2, 3, 2)
    for function in (gaussian.cumulative, gaussian.density):
        assert function(z).dtype == np.float32
        assert function(z).shape == z.shape
    exact = gaussian.cumulative(z.astype(np.float64))
    assert abs(gaussian.cumulative(z) - exact).max() < 3e-7
