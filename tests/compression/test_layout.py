"""Blocks and codes: every size comes back, in the order of HQQ's bytes, and what cannot be quantised is refused."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.compression import layout
from minimoe.core.errors import UserError


@given(bits=st.sampled_from([2, 3, 4]), count=st.integers(1, 45), size=st.integers(1, 5), seed=st.integers(0, 99))
def test_packed_codes_come_back(bits: int, count: int, size: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(2**bits, size=(count, size)).astype(np.uint8)
    packed = layout.pack(codes, bits)
    assert packed.shape == layout.packed_shape(count, size, bits)
    assert packed.dtype == layout.PACKINGS[bits].dtype
    np.testing.assert_array_equal(layout.unpack(packed, bits, count), codes)


def test_the_first_blocks_are_in_the_highest_bits() -> None:
    codes = np.arange(1, 5, dtype=np.uint8)[:, None]
    np.testing.assert_array_equal(layout.pack(codes, 4), [[1 << 4 | 3], [2 << 4 | 4]])
    np.testing.assert_array_equal(layout.pack(codes[:3], 2), [[1 << 6 | 2 << 4 | 3 << 2]])
    np.testing.assert_array_equal(layout.pack(codes[:2], 3), [[1 << 27 | 2 << 24]])


def test_ten_largest_codes_fill_an_int32() -> None:
    np.testing.assert_array_equal(layout.pack(np.full((10, 1), 7, np.uint8), 3), [[2**30 - 1]])


@given(inputs=st.integers(1, 12), outputs=st.integers(1, 12), size=st.integers(1, 200))
def test_blocks_of_every_size_become_the_matrix_again(inputs: int, outputs: int, size: int) -> None:
    w = np.arange(1.0, inputs * outputs + 1).reshape(inputs, outputs)
    for mode, filling in (("constant", 0), ("edge", w[-1, -1])):
        rows = layout.blocks(w, size, mode)
        assert rows.shape == (layout.number_of_blocks(w.shape, size), size)
        assert (rows.reshape(-1)[w.size :] == filling).all()
        again = layout.matrix(rows, w.shape)
        assert (again.dtype, again.flags.c_contiguous) == (np.float32, True)
        np.testing.assert_array_equal(again, w)


def test_a_block_holds_weights_of_one_output() -> None:
    w = np.arange(6.0).reshape(3, 2)  # (inputs, outputs)
    np.testing.assert_array_equal(layout.blocks(w, 3, "edge"), w.T)


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.complex64])
def test_another_type_is_refused_in_a_sentence(dtype: Any) -> None:
    with pytest.raises(UserError, match=f"type {np.dtype(dtype)} cannot be quantised, only float16 and float32"):
        layout.checked(np.ones((2, 2), dtype))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(UserError, match=f"a weight is {value}, which has no code"):
        layout.checked(np.array([[1, value]], np.float32))


@pytest.mark.parametrize("shape", [(3,), (1, 2, 3), (0, 4), (4, 0)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="give a matrix"):
        layout.checked(np.ones(shape, np.float32))


def test_a_block_holds_at_least_one_weight() -> None:
    assert layout.checked_size(1, "group") == 1
    with pytest.raises(UserError, match="group 0 is too small"):
        layout.checked_size(0, "group")


@given(bits=st.sampled_from([2, 3, 4]), count=st.integers(1, 60), seed=st.integers(0, 99), data=st.data())
def test_a_range_of_blocks_is_unpacked_without_the_others(bits: int, count: int, seed: int, data: Any) -> None:
    codes = np.random.default_rng(seed).integers(2**bits, size=(count, 5)).astype(np.uint8)
    packed = layout.pack(codes, bits)
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    np.testing.assert_array_equal(layout.unpack_range(packed, bits, start, stop), codes[start:stop])
