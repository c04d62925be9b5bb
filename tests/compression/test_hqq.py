"""HQQ: the bytes of hqq, where a weight may be, what the optimisation gains on outliers, and its guards."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from weights import drawn, golden, matrices

from minimoe.compression import hqq, layout, rtn
from minimoe.core.errors import UserError


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_bytes_are_those_of_hqq(bits: int) -> None:
    q = hqq.quantize(golden()["w.heavy"], bits, 32, np.float32)
    np.testing.assert_array_equal(q.codes, golden()[f"hqq{bits}.codes"])
    np.testing.assert_allclose(q.step, golden()[f"hqq{bits}.step"], rtol=1e-6)
    np.testing.assert_allclose(q.offset, -golden()[f"hqq{bits}.zero"] * q.step, atol=1e-5)


@given(
    w=matrices,
    bits=st.sampled_from([2, 3, 4]),
    group=st.integers(1, 130),
    dtype=st.sampled_from([np.float16, np.float32]),
)
def test_a_weight_is_half_a_step_from_its_place_in_the_interval(
    w: NDArray[np.float32], bits: int, group: int, dtype: Any
) -> None:
    q = hqq.quantize(w, bits, group, dtype)
    assert np.isfinite(q.offset).all()
    assert (q.step > 0).all()
    step, offset = (
        np.repeat(values.astype(np.float64), group)[: w.size].reshape(w.T.shape).T for values in (q.step, q.offset)
    )
    inside = np.clip(w.astype(np.float64), offset, offset + (2**bits - 1) * step)
    error = abs(w - hqq.dequantize(q))
    assert (error <= step / 2 + abs(w - inside) + 1e-6 * (abs(w) + abs(offset))).all()
    for made, blank in zip(q, hqq.blank(w.shape, bits, group, dtype), strict=True):
        if isinstance(blank, np.ndarray):
            assert (made.shape, made.dtype) == (blank.shape, blank.dtype)
        else:
            assert made == blank


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_with_outliers_its_error_is_smaller_than_that_of_plain_rounding(bits: int) -> None:
    w = drawn("heavy", (64, 64))
    errors = {
        module: (abs(w - module.dequantize(module.quantize(w, bits, 64))) ** hqq.POWER).mean() for module in (hqq, rtn)
    }
    assert errors[hqq] < 0.97 * errors[rtn]


def test_on_small_weights_the_errors_of_a_group_add_up_to_zero() -> None:
    """No error is an outlier, so each round moves z by the mean error of the group."""
    w = drawn("normal", (64, 32))
    plain, moved = (abs((w - module.dequantize(module.quantize(w, 2, 64))).mean(0)).mean() for module in (rtn, hqq))
    assert moved < 0.5 * plain


def test_what_shrinks() -> None:
    errors = np.array([-2.0, -0.1, 0.0, 0.1, 0.17, 0.1701, 2.0])
    expected = 2 - 2**-0.3 / 10
    np.testing.assert_allclose(hqq.shrink(errors)[[0, -1]], [-expected, expected], rtol=1e-12)
    assert not hqq.shrink(errors)[1:5].any()
    assert hqq.shrink(errors)[5] == pytest.approx(0, abs=1e-3)


def test_shrinking_and_the_mean_are_the_two_halves_of_one_problem(rng: np.random.Generator) -> None:
    """For fixed codes and e, no other z has a smaller Σ (w − e − (q − z) step)²."""
    w, step = rng.standard_normal(30), 0.4
    q = rng.integers(4, size=30)
    e = hqq.shrink(w)
    z = (q - (w - e) / step).mean()
    best = ((w - e - (q - z) * step) ** 2).sum()
    for other in (z - 1e-3, z + 1e-3):
        assert ((w - e - (q - other) * step) ** 2).sum() > best


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_constant_group_comes_back(value: float, bits: int) -> None:
    w = np.full((64, 2), value, np.float32)
    w[:, 1] = np.arange(64)
    q = hqq.quantize(w, bits, 64, np.float32)
    np.testing.assert_allclose(hqq.dequantize(q)[:, 0], value, atol=1e-6)


def test_one_outlier_in_zeros() -> None:
    w = np.zeros((64, 1), np.float32)
    w[9] = 50
    again = hqq.dequantize(hqq.quantize(w, 4))
    assert abs(again[9] - 50) < 5
    assert abs(np.delete(again, 9)).max() < 2


def test_the_codes_agree_with_the_rounded_step_and_offset() -> None:
    """They are computed from what is stored, not from what it was before it became float16."""
    w = drawn("shifted", (64, 16))
    q = hqq.quantize(w, 4)
    step, offset = q.step[:, None].astype(float), q.offset[:, None].astype(float)
    codes = np.clip(np.rint((w.T - offset) / step), 0, 15)
    np.testing.assert_array_equal(layout.unpack(q.codes, 4, 16), codes)


def test_what_cannot_be_quantised_is_refused() -> None:
    w = np.ones((2, 2), np.float32)
    with pytest.raises(UserError, match="type float64"):
        hqq.quantize(w.astype(np.float64))
    with pytest.raises(UserError, match="bits 8 is not possible"):
        hqq.quantize(w, 8)
    with pytest.raises(UserError, match="expected at most 32752"):
        hqq.quantize(40000 * w)
