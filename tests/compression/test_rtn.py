"""Round to nearest: the codes of hqq without its optimisation, the bound, groups that are constant or do not divide."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from weights import drawn, golden, matrices

from minimoe.compression import layout, rtn
from minimoe.core.errors import UserError


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_bytes_are_those_of_hqq_without_its_optimisation(bits: int) -> None:
    q = rtn.quantize(golden()["w.heavy"], bits, 32, np.float32)
    np.testing.assert_array_equal(q.codes, golden()[f"rtn{bits}.codes"])
    np.testing.assert_allclose(q.step, golden()[f"rtn{bits}.step"], rtol=1e-6)
    np.testing.assert_allclose(q.offset, -golden()[f"rtn{bits}.zero"] * q.step, atol=1e-5)


def test_by_hand() -> None:
    w = np.array([[-1, 3], [0, 3.5], [1.4, 4], [2, 6]], np.float32)
    q = rtn.quantize(w, 2, 4)
    np.testing.assert_array_equal(q.offset, [-1, 3])  # one group for each output
    np.testing.assert_array_equal(q.step, [1, 1])
    np.testing.assert_array_equal(layout.unpack(q.codes, 2, 2), [[0, 1, 2, 3], [0, 0, 1, 3]])  # 0.5 → the even 0
    np.testing.assert_array_equal(rtn.dequantize(q), [[-1, 3], [0, 3], [1, 4], [2, 6]])


@given(
    w=matrices,
    bits=st.sampled_from([2, 3, 4]),
    group=st.integers(1, 130),
    dtype=st.sampled_from([np.float16, np.float32]),
)
def test_no_weight_is_further_off_than_half_a_step(w: NDArray[np.float32], bits: int, group: int, dtype: Any) -> None:
    q = rtn.quantize(w, bits, group, dtype)
    step = np.repeat(q.step.astype(np.float64), group)[: w.size].reshape(w.T.shape).T
    assert (abs(w - rtn.dequantize(q)) <= step / 2 + 1e-6 * abs(w)).all()
    for made, blank in zip(q, rtn.blank(w.shape, bits, group, dtype), strict=True):
        if isinstance(blank, np.ndarray):
            assert (made.shape, made.dtype) == (blank.shape, blank.dtype)
        else:
            assert made == blank


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_step_is_no_wider_than_the_weights_need(bits: int) -> None:
    """The bound above would also hold for one step that is far too wide."""
    w = drawn("normal", (64, 9))
    q = rtn.quantize(w, bits, 64)
    np.testing.assert_allclose(q.step, np.ptp(w, axis=0) / (2**bits - 1), rtol=3e-3)
    codes = layout.unpack(q.codes, bits, 9)
    assert (codes.min(1).tolist(), codes.max(1).tolist()) == ([0] * 9, [2**bits - 1] * 9)


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1000.1])
def test_a_constant_group_comes_back(value: float) -> None:
    w = np.full((64, 2), value, np.float32)
    w[:, 1] = np.arange(64)
    q = rtn.quantize(w, 4, 64)
    assert np.isfinite(q.step).all()
    assert (q.step > 0).all()
    np.testing.assert_allclose(rtn.dequantize(q)[:, 0], value, rtol=1e-4)


def test_a_constant_that_float16_holds_has_the_step_one() -> None:
    q = rtn.quantize(np.full((8, 1), -0.5, np.float32), 4, 8)
    assert (q.step.tolist(), q.offset.tolist()) == ([1], [-0.5])
    assert not q.codes.any()


def test_the_last_group_is_filled_up_with_what_it_holds() -> None:
    """Zeros instead would widen the interval of the last group."""
    w = drawn("shifted", (50, 1))
    q = rtn.quantize(w, 4, 32)
    assert q.step[1] < 0.1
    assert abs(w - rtn.dequantize(q)).max() < 0.05


@given(numbers=st.lists(st.floats(-60000, 60000), min_size=1, max_size=5), up=st.booleans())
def test_a_number_is_rounded_in_the_direction_that_is_asked(numbers: list[float], up: bool) -> None:
    values = np.array(numbers)
    rounded = rtn.towards(values, np.inf if up else -np.inf, np.float16)
    assert rounded.dtype == np.float16
    assert ((rounded >= values) if up else (rounded <= values)).all()
    assert (abs(rounded - values) <= np.maximum(abs(values) * 2**-10, 2**-24)).all()


def test_what_cannot_be_quantised_is_refused() -> None:
    w = np.ones((2, 2), np.float32)
    with pytest.raises(UserError, match="type float64"):
        rtn.quantize(w.astype(np.float64))
    with pytest.raises(UserError, match="bits 5 is not possible: choose one of 2, 3, 4"):
        rtn.quantize(w, 5)
    with pytest.raises(UserError, match="group 0 is too small"):
        rtn.quantize(w, 4, 0)
    with pytest.raises(UserError, match="size 40000, expected at most 32752"):
        rtn.quantize(-40000 * w)
    assert np.isfinite(rtn.dequantize(rtn.quantize(-40000 * w, dtype=np.float32))).all()
