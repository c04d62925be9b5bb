"""Sums of exponentials in logarithms, also where the exponentials themselves are no numbers."""

import numpy as np
import pytest

from minimoe.beyond import log_space


def test_it_agrees_with_the_plain_formulas(rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 4, 5))
    total = np.exp(x).sum(-1, keepdims=True)
    np.testing.assert_allclose(log_space.log_sum_exp(x), np.log(total))
    np.testing.assert_allclose(log_space.log_softmax(x), np.log(np.exp(x) / total))


@pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
def test_far_from_zero_nothing_overflows_and_nothing_vanishes(size: float) -> None:
    x = np.array([[size, size, size - 1e4]])
    assert log_space.log_sum_exp(x)[0, 0] == pytest.approx(size + np.log(2))
    np.testing.assert_allclose(log_space.log_softmax(x), [[-np.log(2), -np.log(2), -1e4 - np.log(2)]])


def test_what_is_too_small_is_zero_also_where_a_program_stops_at_every_warning() -> None:
    with np.errstate(all="raise"):
        assert log_space.exp(np.array([-1e4]))[0] == 0
        assert np.isfinite(log_space.log_softmax(np.array([0.0, -1e4]))).all()


def test_every_row_has_its_own_largest() -> None:
    x = np.array([[0.0, 1.0], [-1e4, 1.0 - 1e4]])
    np.testing.assert_allclose(np.diff(log_space.log_sum_exp(x), axis=0), [[-1e4]])
    np.testing.assert_allclose(*log_space.log_softmax(x))
