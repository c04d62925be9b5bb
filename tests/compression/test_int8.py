"""Eight bits: the codes of bitsandbytes, the bound on the error, and products with outlier columns."""

import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray
from weights import drawn, golden, matrices

from minimoe.compression import int8
from minimoe.core.errors import UserError


def test_the_codes_are_those_of_bitsandbytes() -> None:
    q = int8.quantize(golden()["w.normal"])
    np.testing.assert_array_equal(q.codes.T, golden()["int8.codes"])
    np.testing.assert_array_equal(q.absmax, golden()["int8.absmax"])


def test_by_hand() -> None:
    w = np.array([[1, -4], [0.3, 8], [-2, 1]], np.float32)
    q = int8.quantize(w)
    np.testing.assert_array_equal(q.absmax, [2, 8])  # of each output, that is of each column
    np.testing.assert_array_equal(q.codes, [[64, -64], [19, 127], [-127, 16]])  # 63.5 rounds to the even 64
    assert (q.codes.dtype, q.absmax.dtype) == (np.int8, np.float32)


@given(w=matrices)
def test_no_weight_is_further_off_than_half_a_step(w: NDArray[np.float32]) -> None:
    q = int8.quantize(w)
    w = w.astype(np.float64)
    error = np.abs(w - int8.dequantize(q))
    assert (error <= np.abs(w).max(0) / 254 + 1e-6 * np.abs(w)).all()
    assert abs(q.codes).max() <= 127
    for made, blank in zip(q, int8.blank(w.shape), strict=True):
        assert (made.shape, made.dtype) == (blank.shape, blank.dtype)


def test_quantising_again_changes_nothing() -> None:
    once = int8.dequantize(int8.quantize(drawn("normal", (40, 6))))
    np.testing.assert_allclose(int8.dequantize(int8.quantize(once)), once, rtol=1e-6)


def test_a_column_of_zeros_stays_zero_and_changes_no_other() -> None:
    w = drawn("zero column", (20, 3))
    q = int8.quantize(w)
    assert not int8.dequantize(q)[:, 0].any()
    np.testing.assert_array_equal(q.codes[:, 1:], int8.quantize(w[:, 1:]).codes)


def test_a_product_is_that_of_the_codes(rng: np.random.Generator) -> None:
    """Against loops over rows, columns and inputs."""
    w, x = drawn("normal", (7, 4)), rng.standard_normal((5, 7))
    q = int8.quantize(w)
    expected = np.zeros((5, 4))
    for n in range(5):
        c_x = max(abs(value) for value in x[n])
        for j in range(4):
            total = sum(round(127 * x[n, i] / c_x) * int(q.codes[i, j]) for i in range(7))
            expected[n, j] = total * c_x * q.absmax[j] / 127**2
    np.testing.assert_allclose(int8.matmul(x, q), expected, rtol=1e-6)


@pytest.mark.parametrize("outliers", [0, 1, 3])
def test_the_error_of_a_product_is_bounded(rng: np.random.Generator, outliers: int) -> None:
    w, x = drawn("normal", (50, 8)), rng.uniform(-5, 5, (6, 50)).astype(np.float32)
    x[2, :outliers] = 60  # one token is enough to make a column an outlier
    q = int8.quantize(w)
    y = int8.matmul(x, q)
    assert y.dtype == np.float32
    plain = np.abs(x[:, outliers:]).max(1, keepdims=True)
    bound = plain / 254 * np.abs(int8.dequantize(q))[outliers:].sum(0)
    assert (np.abs(y - x @ int8.dequantize(q)) <= bound + 1e-4).all()


def test_one_outlier_costs_the_others_their_codes_unless_its_column_stays_float(rng: np.random.Generator) -> None:
    w, x = drawn("normal", (64, 16)), rng.standard_normal((8, 64)).astype(np.float32)
    x[:, 5] = 300
    q = int8.quantize(w)
    exact = x @ int8.dequantize(q)
    apart, together = (np.abs(int8.matmul(x, q, threshold) - exact).mean() for threshold in (6.0, np.inf))
    assert together > 50 * apart


def test_an_outlier_is_at_least_as_large_as_the_threshold() -> None:
    q = int8.quantize(np.array([[0.1], [1]], np.float32))
    x = np.array([[6.0, -0.01]])
    assert int8.matmul(x, q)[0, 0] == pytest.approx(x @ int8.dequantize(q), rel=1e-6)
    assert int8.matmul(x, q, 6.1)[0, 0] != pytest.approx(x @ int8.dequantize(q), rel=1e-6)


def test_a_row_of_zeros_gives_zeros() -> None:
    q = int8.quantize(drawn("normal", (5, 3)))
    np.testing.assert_array_equal(int8.matmul(np.zeros((2, 5)), q), np.zeros((2, 3)))
    np.testing.assert_array_equal(int8.matmul(np.zeros((0, 5)), q), np.zeros((0, 3)))


def test_float64_is_refused() -> None:
    with pytest.raises(UserError, match="type float64 cannot be quantised"):
        int8.quantize(np.ones((2, 2)))
