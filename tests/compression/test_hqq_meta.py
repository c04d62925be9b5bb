"""HQQ with steps and offsets in 8 bits: where a weight may be, how far the shared numbers are off, bits, and guards."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from weights import drawn, matrices

from minimoe.compression import hqq, hqq_meta, layout
from minimoe.core.errors import UserError


@given(w=matrices, bits=st.sampled_from([2, 3, 4]), group=st.integers(1, 130))
def test_a_weight_is_half_a_step_from_its_place_in_the_interval(w: NDArray[np.float32], bits: int, group: int) -> None:
    q = hqq_meta.quantize(w, bits, group)
    kept = hqq_meta.expanded(q)
    assert (kept.step > 0).all()
    step, offset = (
        np.repeat(values.astype(np.float64), group)[: w.size].reshape(w.T.shape).T
        for values in (kept.step, kept.offset)
    )
    inside = np.clip(w.astype(np.float64), offset, offset + (2**bits - 1) * step)
    error = abs(w - hqq_meta.dequantize(q))
    assert (error <= step / 2 + abs(w - inside) + 1e-6 * (abs(w) + abs(offset))).all()
    for made, blank in zip(q, hqq_meta.blank(w.shape, bits, group), strict=True):
        if isinstance(blank, np.ndarray):
            assert (made.shape, made.dtype) == (blank.shape, blank.dtype)
        else:
            assert made == blank


@given(w=matrices, group=st.sampled_from([1, 3, 16]))
def test_steps_and_offsets_are_as_near_as_the_docstring_says(w: NDArray[np.float32], group: int) -> None:
    """Each is half a part away at most, and a part is 1/255 of what 128 of them differ by."""
    plain = hqq.quantize(w, 2, group, np.float32)
    kept = hqq_meta.expanded(hqq_meta.quantize(w, 2, group))
    for true, near in ((plain.step, kept.step), (plain.offset, kept.offset)):
        for start in range(0, len(true), 128):
            own, rounded = true[start : start + 128].astype(np.float64), near[start : start + 128]
            spacing = np.spacing(np.float16(abs(own).max())).astype(float) + 6e-8  # of float16, and its smallest number
            assert (abs(own - rounded) <= np.ptp(own) / 510 * 1.002 + spacing).all()


def test_each_128_groups_share_their_own_numbers() -> None:
    """Weights a hundred times as large in the next 128 groups change nothing in the first."""
    w = drawn("normal", (16, 256))
    before = hqq_meta.quantize(w, 2, 16)
    w[:, 128:] *= 100
    after = hqq_meta.quantize(w, 2, 16)
    assert before.step_low.shape == (2,)
    for field in ("step", "offset"):
        np.testing.assert_array_equal(getattr(before, field)[:128], getattr(after, field)[:128])


def test_the_largest_and_the_smallest_step_have_the_codes_at_the_ends() -> None:
    q = hqq_meta.quantize(drawn("normal", (16, 128)), 2, 16)
    assert [q.step.min(), q.step.max(), q.offset.min(), q.offset.max()] == [0, 255, 0, 255]


def test_the_codes_agree_with_what_is_stored() -> None:
    w = drawn("shifted", (64, 16))
    q = hqq_meta.quantize(w, 4, 64)
    kept = hqq_meta.expanded(q)
    scaled = (w.T.astype(float) - kept.offset[:, None].astype(float)) / kept.step[:, None].astype(float)
    np.testing.assert_array_equal(layout.unpack(q.codes, 4, 16), np.clip(np.rint(scaled), 0, 15))


def test_a_step_that_float16_cannot_hold_is_not_zero() -> None:
    w = 1e-8 * drawn("normal", (64, 4))
    q = hqq_meta.quantize(w, 4, 64)
    assert (hqq_meta.expanded(q).step > 0).all()
    assert np.isfinite(hqq_meta.dequantize(q)).all()


@pytest.mark.parametrize(("bits", "group", "expected"), [(2, 16, 3.03125), (2, 8, 4.0625), (4, 64, 4.2578125)])
def test_bits_per_weight(bits: int, group: int, expected: float) -> None:
    q = hqq_meta.blank((4096, 1024), bits, group)
    assert 8 * sum(values.nbytes for values in q if isinstance(values, np.ndarray)) / 2**22 == expected


def test_groups_of_16_with_shared_numbers_are_better_than_groups_of_32_without_and_take_as_much() -> None:
    w = drawn("normal", (128, 256))
    small = abs(w - hqq_meta.dequantize(hqq_meta.quantize(w, 2, 16))).mean()
    plain = abs(w - hqq.dequantize(hqq.quantize(w, 2, 16))).mean()
    large = abs(w - hqq.dequantize(hqq.quantize(w, 2, 32))).mean()
    assert abs(small / plain - 1) < 0.005
    assert small < 0.95 * large


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3])
def test_constant_groups(value: float) -> None:
    """All steps and offsets are equal, so their intervals have no length."""
    w = np.full((64, 5), value, np.float32)
    np.testing.assert_allclose(hqq_meta.dequantize(hqq_meta.quantize(w, 2, 16)), value, atol=3e-4)


def test_what_cannot_be_quantised_is_refused() -> None:
    w = np.ones((2, 2), np.float32)
    with pytest.raises(UserError, match="type float64"):
        hqq_meta.quantize(w.astype(np.float64))
    with pytest.raises(UserError, match="bits 8 is not possible"):
        hqq_meta.quantize(w, 8)
    with pytest.raises(UserError, match="expected at most 32752"):
        hqq_meta.quantize(40000 * w)
