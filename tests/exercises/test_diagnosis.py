"""The sentences about wrong arrays and numbers: each pattern is named, and none is named that is not there."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minimoe.exercises import diagnosis

N, D, F = 3, 4, 5
SIZES = {"N": N, "D": D, "F": F}
RIGHT = np.random.default_rng(0).standard_normal((N, D))
SOME_ZEROS = RIGHT * (np.arange(12).reshape(N, D) % 3 > 0)  # 4 of 12 are zero


def sentence(got: Any, want: Any = RIGHT, sizes: dict[str, int] = SIZES, share: bool = False) -> str:
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        return diagnosis.wrong_shape(got, want, sizes)
    return diagnosis.wrong_values(got, want, sizes, share)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda right: -right, "wrong sign everywhere"),
        (lambda right: right / N, "every value is 3 times too small, and 3 is N."),
        (lambda right: -right / N, "3 times too small and has the wrong sign, and 3 is N."),
        (lambda right: right * 2, "every value is 2 times too large."),
        (lambda right: right / 2, "every value is 2 times too small."),
        (lambda right: right * np.sqrt(F), "√F"),
        (lambda right: right * D * F, "D·F"),
        (lambda right: right * 1.7, "every value is 1.7 times what it should be"),
        (lambda right: right * 0, "zero everywhere"),
        (lambda right: right * np.nan, "not finite"),
        (lambda right: right.T, "looks transposed"),
        (lambda right: right[..., None], "the values are right, but a reshape or an index is missing"),
        (lambda right: right.reshape(2, 6) + 1, "check each reshape, transpose and `keepdims`"),
        (lambda right: right.sum(0), "an axis is missing"),
        (lambda right: np.stack([right, right, 7 * right]), "too many axes"),
        (lambda right: right + 0.25, "every value is off by the same constant, 0.25."),
        (lambda right: right + right.mean(1, keepdims=True), "every row is off by its own constant"),
        (lambda right: right * [[1], [2], [3]], "every row is right except for its own constant factor"),
        (lambda right: right * [1, 2, 3, 4], "every column is right except for its own"),
        (lambda right: right * [[1], [0], [1]], "4 entries are zero and must not be, the first at [1, 0]"),
        (lambda right: right[::-1], "wrong places"),
        (lambda right: right + 1e-5 * np.sin(np.arange(12)).reshape(3, 4), "nearly right"),
        (lambda right: right / (1 + 1e-5), "nearly right"),  # not: 1 times what it should be
        (lambda right: right / (abs(right) + 1e-5) * abs(right), "nearly right"),
        (lambda right: np.where(right == right[1, 2], 9, right), "11 of 12 entries are right; the first wrong"),
        (lambda right: np.sin(9 * right), "the shape is right, but none of the values are"),
    ],
)
def test_a_wrong_array_is_described(change: Callable[..., Any], words: str):
    assert words in sentence(change(RIGHT))


@pytest.mark.parametrize("off", [1e-3, 1e-4, 1e-5, 2e-6, -1e-4, 4e-4])
@pytest.mark.parametrize("want", [RIGHT, 2.5], ids=["array", "number"])
def test_nothing_is_ever_1_times_what_it_should_be(off: float, want: Any):
    said = sentence(np.asarray(want) * (1 + off), want)
    assert " 1 times" not in said
    assert said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda right: np.sin(9 * right), "the zeros are in the right places, but none of the other values are right"),
        (lambda right: np.where(right == 0, 0.5, right), "4 entries are not zero and must be, the first at [0, 0]"),
        (
            lambda right: right * (np.arange(12).reshape(3, 4) != 5),
            "1 entry is zero and must not be, the first at [1, 1]",
        ),
        (
            lambda right: np.where(np.arange(12).reshape(3, 4) == 5, 9, right),
            "7 of 8 entries that are not zero are right",
        ),
        (lambda right: np.where(right == 0, 0.5, np.sin(9 * right)), "none of the values are"),
    ],
)
def test_zeros_are_not_counted_as_right_entries(change: Callable[..., Any], words: str):
    assert words in sentence(change(SOME_ZEROS), SOME_ZEROS)


@pytest.mark.parametrize(
    ("got", "want", "words"),
    [
        (7.5, 2.5, "it is 3 times too large, and 3 is N."),
        (0.5, 2.5, "it is 5 times too small, and 5 is F."),
        (-0.5, 2.5, "it is 5 times too small and has the wrong sign, and 5 is F."),
        (7.5 * 4, 2.5, "it is 12 times too large, and 12 is D·N."),
        (6.0, 2.5, "it is 6, which is too large."),
        (-7.0, 2.5, "it is -7, which is too small."),
        (-2.5, 2.5, "it has the wrong sign."),
        (2.50001, 2.5, "nearly right"),
        (0.0, 2.5, "it is zero."),
        (np.inf, 2.5, "it is not finite."),
        (24, 2, "it is 24, which is too large."),  # a product of sizes, but by accident
        (3, 0, "it is 3, which is too large."),
        (np.array([2.5]), 2.5, "it is an array of shape (1,), expected a number: the values are right"),
        (np.array([1.0, 1.5]), 2.5, "must still be summed over axis 0"),
    ],
)
def test_a_wrong_number_is_described(got: Any, want: float, words: str):
    assert words in sentence(got, want)


@pytest.mark.parametrize(
    ("got", "words"),
    [
        ([25.0, 70.0, 5.0], "this is in per cent: give a share between 0 and 1."),
        ([-0.3, 1.2, 0.1], "it must lie between 0 and 1, but here it has values from -0.3 to 1.2."),
        ([0.3, 0.6, 0.1], "none of the values are"),
    ],
)
def test_a_share_lies_between_0_and_1(got: Any, words: str):
    want = np.array([0.25, 0.7, 0.05])
    assert words in sentence(got, want, share=True)
    assert "between 0 and 1" not in sentence(got, want)


def test_a_single_share_lies_between_0_and_1():
    assert "per cent" in sentence(25.0, 0.25, share=True)
    assert sentence(1.5, 0.25, share=True) == "it must lie between 0 and 1, but it is 1.5."
    assert "too large" in sentence(0.7, 0.25, share=True)


def test_equal_sizes_are_all_named():
    assert "and 3 is N or K." in sentence(3 * RIGHT, sizes={"N": 3, "K": 3})


def test_a_factor_of_one_size_is_not_called_a_product():
    assert sentence(6 * RIGHT, sizes={"E": 6, "N": 3, "K": 2}).endswith("and 6 is E.")
