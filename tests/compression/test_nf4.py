"""NF4: the bytes of bitsandbytes with and without double quantisation, bounds, every block size, guards."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from weights import drawn, golden, matrices

from minimoe.compression import nf4
from minimoe.core.errors import UserError


@pytest.mark.parametrize("block", [64, 128])
def test_the_bytes_are_those_of_bitsandbytes(block: int) -> None:
    q = nf4.quantize(golden()["w.normal"], block, double=False)
    np.testing.assert_array_equal(q.codes, golden()[f"nf4.{block}.codes"])
    np.testing.assert_array_equal(q.absmax, golden()[f"nf4.{block}.absmax"])
    np.testing.assert_allclose(nf4.dequantize(q).T, golden()[f"nf4.{block}.w"], atol=1e-6)


def test_double_quantisation_is_that_of_bitsandbytes() -> None:
    q = nf4.quantize(golden()["w.long"])
    assert q.offset is not None
    assert q.nested_absmax is not None
    np.testing.assert_array_equal(q.codes, golden()["nested.codes"])
    np.testing.assert_array_equal(q.absmax, golden()["nested.absmax"])
    np.testing.assert_allclose(q.offset, golden()["nested.offset"], rtol=1e-6)
    np.testing.assert_allclose(q.nested_absmax, golden()["nested.nested_absmax"], rtol=1e-6)
    np.testing.assert_allclose(nf4.dequantize(q).T[-8:], golden()["nested.w"], atol=1e-7)


def test_the_levels_and_the_map_are_those_of_bitsandbytes() -> None:
    np.testing.assert_allclose(nf4.LEVELS, golden()["levels"], atol=2e-7)
    np.testing.assert_allclose(nf4.DYNAMIC_MAP, golden()["dynamic_map"], atol=1e-7)
    assert nf4.LEVELS[[0, nf4.ZERO, 15]].tolist() == [-1, 0, 1]


@given(w=matrices, block=st.integers(1, 130), double=st.booleans())
def test_no_weight_is_further_off_than_the_docstring_says(w: NDArray[np.float32], block: int, double: bool) -> None:
    q = nf4.quantize(w, block, double)
    padded = np.pad(w.T.reshape(-1).astype(np.float64), (0, -w.size % block))
    absmax = abs(padded).reshape(-1, block).max(1)
    c = np.repeat(absmax, block)[: w.size].reshape(w.T.shape).T
    spread = 0.0
    if double:
        largest = [abs(absmax[i : i + 256] - absmax.mean()).max() for i in range(0, len(absmax), 256)]
        of_block = np.repeat(np.repeat(largest, 256)[: len(absmax)], block)
        spread = of_block[: w.size].reshape(w.T.shape).T
    assert (abs(w - nf4.dequantize(q)) <= 0.152 * c + 0.0071 * spread + 1e-6 * (c + absmax.mean())).all()
    for made, blank in zip(q, nf4.blank(w.shape, block, double), strict=True):
        if isinstance(blank, np.ndarray):
            assert (made.shape, made.dtype) == (blank.shape, blank.dtype)
        else:
            assert made == blank


def test_every_code_of_a_block_size_comes_back() -> None:
    """A level that is divided by 1 and rounded is itself, in blocks of every usual size and of some that do not fit."""
    rng = np.random.default_rng(1)
    for block in (1, 7, 32, 64, 100, 128, 256, 512, 1024, 2048, 4096):
        codes = rng.integers(16, size=2 * block + 3)
        codes[::block] = 15  # each block has a weight of 1
        w = nf4.LEVELS[codes].reshape(-1, 1)
        q = nf4.quantize(w, block, double=False)
        np.testing.assert_array_equal(nf4.dequantize(q), w)


def test_the_error_grows_slowly_with_the_block_size() -> None:
    """0.0727 for blocks of 64 of normal weights."""
    w = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32)
    blocks = (64, 256, 512, 1024, 4096)
    errors = {block: abs(w - nf4.dequantize(nf4.quantize(w, block, double=False))).mean() for block in blocks}
    assert errors[64] == pytest.approx(0.0727, abs=3e-4)
    assert list(errors.values()) == sorted(errors.values())
    assert errors[4096] < 1.4 * errors[64]


def test_the_first_of_two_weights_is_in_the_high_half() -> None:
    assert nf4.quantize(np.array([[1], [-1]], np.float32)).codes.tolist() == [0xF0]
    assert nf4.quantize(np.array([[1]], np.float32)).codes.tolist() == [0xF0 | nf4.ZERO]


def test_the_smaller_code_wins_a_tie() -> None:
    middle = (nf4.LEVELS[11].astype(float) + nf4.LEVELS[12]) / 2
    w = np.array([[1], [middle]], np.float32)
    assert float(w[1, 0]) == np.float32((nf4.LEVELS[11] + nf4.LEVELS[12]) / 2)
    assert nf4.quantize(w, 2).codes.tolist() == [0xFB]


def test_a_block_holds_weights_of_one_output() -> None:
    w = np.ones((64, 2), np.float32)
    w[:, 1] = 100
    np.testing.assert_array_equal(nf4.quantize(w, double=False).absmax, [1, 100])


def test_double_quantisation_is_undone() -> None:
    """What it costs is small, but it is not nothing: the maxima are codes until they are looked up."""
    w = drawn("normal", (64, 300))
    single, double = nf4.quantize(w, double=False), nf4.quantize(w)
    np.testing.assert_array_equal(single.codes, double.codes)
    c = nf4.absmax_of(double)
    spread = abs(single.absmax - single.absmax.mean()).max()
    assert 0 < abs(c - single.absmax).max() <= 0.0071 * spread
    assert double.absmax.dtype == np.uint8


def test_bits_per_weight() -> None:
    def bits(double: bool) -> float:
        q = nf4.blank((4096, 1024), double=double)
        return 8 * sum(values.nbytes for values in q if isinstance(values, np.ndarray)) / 2**22

    assert bits(double=False) == 4.5
    assert bits(double=True) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-5)


@pytest.mark.parametrize("double", [False, True])
def test_zeros_stay_zeros(double: bool) -> None:
    w = drawn("normal", (64, 5))
    w[:, 2] = 0
    again = nf4.dequantize(nf4.quantize(w, double=double))
    assert np.isfinite(again).all()
    assert not again[:, 2].any()


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(UserError, match="type float64"):
        nf4.quantize(np.ones((2, 2)))
    with pytest.raises(UserError, match="block -1 is too small"):
        nf4.quantize(np.ones((2, 2), np.float32), -1)
