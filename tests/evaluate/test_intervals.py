"""Confidence intervals: known values, and that they hold the truth as often as they say."""

import math

import numpy as np
import pytest

from minimoe.evaluate import intervals
from minimoe.evaluate.intervals import Interval, answers_apart, ratio, ratios_apart, shares_apart, wilson


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_has_the_published_values(hits: int, n: int, low: float, high: float) -> None:
    """The last one is an example of Newcombe 1998, Statistics in Medicine 17, p. 857."""
    found = wilson(hits, n)
    assert found.value == hits / n
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_wilson_solves_its_own_equation() -> None:
    """Its bounds are the shares that lie exactly z of their own standard deviations from what was seen."""
    for hits, n in ((1, 7), (3, 40), (39, 40)):
        p, low, high = wilson(hits, n)
        for bound in (low, high):
            assert abs(p - bound) == pytest.approx(intervals.Z * math.sqrt(bound * (1 - bound) / n))


def test_shares_apart_has_the_published_value() -> None:
    """56 of 70 against 48 of 80: 0.2000, 0.0524 to 0.3339 (Newcombe 1998, Statistics in Medicine 17, p. 876)."""
    assert shares_apart(wilson(56, 70), wilson(48, 80)) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    there, back = shares_apart(wilson(9, 10), wilson(3, 10)), shares_apart(wilson(3, 10), wilson(9, 10))
    assert there == pytest.approx((-back.value, -back.high, -back.low))


def test_answers_apart_has_the_published_value() -> None:
    """36 right by both, 12 and 2 by one alone: 0.2000, 0.0569 to 0.3404 (Newcombe 1998, Stat. Med. 17, p. 2635)."""
    one, other = (np.repeat(marks, (36, 12, 2)) for marks in ([True, True, False], [True, False, True]))
    assert answers_apart(one, other) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)
    back = answers_apart(other, one)
    assert (back.value, back.low, back.high) == pytest.approx((-0.2, -0.3404, -0.0569), abs=5e-5)


def test_answers_apart_hold_the_truth_and_see_more_than_independent_samples() -> None:
    """Two models of 54 and 50 %, of which the better one knows all that the other one knows."""
    rng, held, seen, n = np.random.default_rng(0), [], [], 200
    for luck in rng.random((500, n)):
        one, other = luck < 0.54, luck < 0.50
        apart = answers_apart(one, other)
        held.append(apart.low <= 0.04 <= apart.high)
        seen.append(apart.low > 0)
        assert shares_apart(wilson(int(one.sum()), n), wilson(int(other.sum()), n)).low < 0
    assert 0.93 <= np.mean(held) <= 0.99
    assert np.mean(seen) > 0.8


@pytest.mark.parametrize("marks", [np.zeros(5, bool), np.ones(5, bool), np.array([True])])
def test_equal_answers_are_not_apart(marks: np.ndarray) -> None:
    apart = answers_apart(marks, marks)
    assert apart.value == 0
    assert apart.low == pytest.approx(-apart.high)


def pieces(rng: np.random.Generator, n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Bits and bytes of pieces whose true ratio is 2."""
    sizes = rng.integers(50, 150, n)
    return sizes * rng.gamma(4.0, 0.5, n), sizes


def test_the_bootstrap_holds_the_truth_about_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "RESAMPLES", 300)
    rng = np.random.default_rng(0)
    found = [ratio(*pieces(rng), seed=seed) for seed in range(300)]
    held = np.mean([low <= 2 <= high for _, low, high in found])
    assert 0.90 <= held <= 0.98, "95 % are promised; with 300 trials a little less or more is luck"


@pytest.mark.parametrize("n", [intervals.FEWEST_PIECES, 8, 20])
def test_the_bootstrap_of_few_pieces_holds_the_truth_as_often(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "RESAMPLES", 300)
    rng = np.random.default_rng(1)
    sizes = np.full(n, 100.0)
    found = [ratio(sizes * rng.normal(2.0, 0.5, n), sizes, seed=seed) for seed in range(500)]
    assert 0.92 <= np.mean([low <= 2 <= high for _, low, high in found]) <= 0.98


@pytest.mark.parametrize(("freedom", "published"), [(4, 2.776), (9, 2.262), (19, 2.093), (59, 2.001)])
def test_student_has_the_published_values(freedom: int, published: float) -> None:
    assert intervals._student(freedom) == pytest.approx(published, rel=3e-3)


def test_the_bounds_of_few_pieces_are_moved_apart_by_students_t() -> None:
    n, parts = 5, np.array([1.0, 2, 3, 4, 6])
    value, low, high = ratio(parts, np.ones(n))
    rng = np.random.default_rng(0)
    means = np.concatenate([parts[rng.integers(n, size=(100, n))].mean(1) for _ in range(20)])
    below, above = np.percentile(means, [2.5, 97.5])
    wider = intervals._student(n - 1) / intervals.Z * math.sqrt(n / (n - 1))
    assert (low, high) == pytest.approx((value - wider * (value - below), value + wider * (above - value)))


def test_answers_that_never_agree_are_as_far_apart_as_can_be() -> None:
    one, other = (np.repeat(marks, (6, 4)) for marks in ([True, False], [False, True]))
    first, second = wilson(6, 10), wilson(4, 10)  # φ = −1: the distances add up
    low = 0.2 - (first.value - first.low) - (second.high - second.value)
    assert answers_apart(one, other).low == pytest.approx(low)


def test_the_bootstrap_is_as_wide_as_the_central_limit_theorem_says(rng: np.random.Generator) -> None:
    bits, sizes = pieces(rng, 400)
    value, low, high = ratio(bits, sizes)
    spread = (bits - value * sizes).std() / math.sqrt(400) / sizes.mean()
    assert value == bits.sum() / sizes.sum()
    assert high - low == pytest.approx(2 * intervals.Z * spread, rel=0.1)


def test_a_difference_on_the_same_pieces_is_known_better_than_either_number(rng: np.random.Generator) -> None:
    bits, sizes = pieces(rng)
    apart = ratios_apart(bits, bits + 0.1 * sizes * rng.uniform(0.5, 1.5, len(sizes)), sizes)
    alone = ratio(bits, sizes)
    assert apart.low < -0.1 < apart.high < 0
    assert apart.high - apart.low < 0.2 * (alone.high - alone.low)
    assert ratios_apart(bits, bits, sizes) == (0, 0, 0)


def test_a_seed_repeats_itself_and_few_pieces_have_no_bounds(rng: np.random.Generator) -> None:
    bits, sizes = pieces(rng)
    assert ratio(bits, sizes, 3) == ratio(bits, sizes, 3) != ratio(bits, sizes, 4)
    few: Interval = ratio(bits[:4], sizes[:4])
    assert few.value == bits[:4].sum() / sizes[:4].sum()
    assert math.isnan(few.low) and math.isnan(few.high)
