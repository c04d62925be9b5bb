"""Sampling: the odds worked out by hand, frequencies held to them, and no setting that makes nonsense."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minimoe.core.errors import UserError
from minimoe.inference.sampling import probabilities, sample

ODDS = np.array([0.15, 0.5, 0.05, 0.3])
LOGITS = np.log(ODDS)

some_logits = st.lists(st.floats(-20, 20), min_size=1, max_size=12).map(np.array)
shares = st.floats(0.001, 0.999)


class FixedDraw(np.random.Generator):
    """A generator whose next uniform number is known."""

    def __init__(self, value: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.value = value

    def random(self) -> float:
        return self.value


def chi_square(counts, odds):
    """Σ (counted − expected)² / expected: about its degrees of freedom if the counts come from these odds."""
    expected = counts.sum() * odds
    return (np.square(counts - expected) / expected).sum()


def chi_square_bound(categories, t=14.0):
    """What a right sampler exceeds with probability e^−t < 10⁻⁶ (Laurent and Massart 2000, lemma 1)."""
    freedom = categories - 1
    return freedom + 2 * math.sqrt(freedom * t) + 2 * t


# The odds


def test_temperature_one_gives_the_softmax():
    assert probabilities(LOGITS) == pytest.approx(ODDS)


def test_half_the_temperature_squares_the_odds():
    assert probabilities(LOGITS, temperature=0.5) == pytest.approx(ODDS**2 / (ODDS**2).sum())


def test_twice_the_temperature_takes_their_root():
    assert probabilities(LOGITS, temperature=2) == pytest.approx(np.sqrt(ODDS) / np.sqrt(ODDS).sum())


def test_temperature_zero_takes_the_likeliest():
    assert probabilities(LOGITS, temperature=0).tolist() == [0, 1, 0, 0]


def test_temperature_zero_takes_the_lowest_index_of_equals():
    assert probabilities(np.array([1.0, 7.0, 7.0, 7.0]), temperature=0).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("temperature", [1e-6, 1e-300, 5e-324])
def test_temperatures_near_zero_come_to_the_same_without_a_warning(temperature):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert probabilities(LOGITS, temperature).tolist() == [0, 1, 0, 0]


def test_a_huge_temperature_makes_all_tokens_equal():
    assert probabilities(LOGITS, temperature=1e300) == pytest.approx(np.full(4, 0.25))


def test_top_k_keeps_the_k_likeliest():
    assert probabilities(LOGITS, top_k=2) == pytest.approx([0, 0.5 / 0.8, 0, 0.3 / 0.8])


def test_top_k_keeps_exactly_k_of_equals_and_of_these_the_lowest_indices():
    assert probabilities(np.zeros(5), top_k=3) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0, 0])


@pytest.mark.parametrize("top_k", [4, 5, 1000])
def test_a_top_k_of_the_whole_vocabulary_changes_nothing(top_k):
    assert probabilities(LOGITS, top_k=top_k) == pytest.approx(ODDS)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.001, [1]), (0.49, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.94, [0, 1, 3]), (0.96, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_likeliest_tokens_that_reach_p(top_p, kept):
    p = probabilities(LOGITS, top_p=top_p)
    assert np.flatnonzero(p).tolist() == kept
    assert p[kept] == pytest.approx(ODDS[kept] / ODDS[kept].sum())


def test_top_p_keeps_the_token_that_lands_exactly_on_p():
    assert np.flatnonzero(probabilities(np.zeros(4), top_p=0.5)).tolist() == [0, 1]


def test_a_top_p_of_one_keeps_even_the_least_likely_token():
    assert (probabilities(np.array([0.0, -80.0]), top_p=1.0) > 0).all()


def test_top_p_counts_what_top_k_has_left():
    # of all tokens the likeliest has 0.5, less than 0.6; of the two likeliest it has 0.625, which is enough
    assert np.flatnonzero(probabilities(LOGITS, top_p=0.6)).tolist() == [1, 3]
    assert np.flatnonzero(probabilities(LOGITS, top_k=2, top_p=0.6)).tolist() == [1]


def test_top_p_counts_after_the_temperature():
    assert np.flatnonzero(probabilities(LOGITS, temperature=0.5, top_p=0.6)).tolist() == [1]  # 0.25 of 0.365


@given(some_logits, shares)
def test_the_nucleus_is_the_smallest_set_that_reaches_p(logits, top_p):
    p = probabilities(logits)
    descending = np.sort(p)[::-1]
    kept = np.count_nonzero(probabilities(logits, top_p=top_p))
    assume((abs(descending.cumsum() - top_p) > 1e-9).all())  # a sum this close may round to either side
    assert descending[:kept].sum() > top_p
    assert descending[: kept - 1].sum() < top_p


@given(some_logits, st.floats(0, 5), st.none() | st.integers(1, 15), st.none() | shares)
def test_probabilities_add_up_to_one_and_never_reverse_an_order(logits, temperature, top_k, top_p):
    p = probabilities(logits, temperature, top_k, top_p)
    assert p.shape == logits.shape
    assert p.sum() == pytest.approx(1)
    assert (p >= 0).all()
    order = np.argsort(logits, kind="stable")
    strictly_better = np.diff(logits[order]) > 0
    assert (np.diff(p[order])[strictly_better] >= 0).all()


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_a_shift_of_all_logits_changes_nothing(shift):
    assert probabilities(LOGITS + shift, top_p=0.9) == pytest.approx(probabilities(LOGITS, top_p=0.9))


def test_a_logit_of_minus_infinity_rules_a_token_out():
    assert probabilities(np.array([0.0, -np.inf, 0.0]), temperature=0.7) == pytest.approx([0.5, 0, 0.5])


def test_float32_logits_give_float64_odds():
    p = probabilities(LOGITS.astype(np.float32))
    assert p.dtype == np.float64
    assert p.sum() == pytest.approx(1, abs=1e-15)


def test_logits_are_left_as_they_were():
    logits = LOGITS.astype(np.float32)
    before = logits.copy()
    sample(logits, np.random.default_rng(0), 0.5, 3, 0.9)
    np.testing.assert_array_equal(logits, before)


# The draw


@pytest.mark.parametrize(
    ("draw", "token"),
    [(0.0, 0), (0.149, 0), (0.151, 1), (0.649, 1), (0.651, 2), (0.699, 2), (0.701, 3), (1 - 2**-53, 3)],
)
def test_a_draw_finds_its_place_among_the_cumulative_odds(draw, token):
    assert sample(LOGITS, FixedDraw(draw)) == token


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_the_extreme_draws_never_take_a_token_of_probability_zero(draw):
    assert sample(np.array([-np.inf, 0.0, -np.inf]), FixedDraw(draw)) == 1
    assert sample(np.log([0.1, 0.2, 0.7]), FixedDraw(draw), top_k=1) == 2


def test_the_largest_draw_takes_the_last_token_even_where_the_odds_add_up_to_less_than_one():
    tenths = np.zeros(10)
    assert probabilities(tenths).cumsum()[-1] == 1 - 2**-53
    assert sample(tenths, FixedDraw(1 - 2**-53)) == 9


@pytest.mark.parametrize(
    ("how", "odds"),
    [
        ({}, [0.15, 0.5, 0.05, 0.3]),
        ({"temperature": 0.5}, [0.15**2 / 0.365, 0.5**2 / 0.365, 0.05**2 / 0.365, 0.3**2 / 0.365]),
        ({"top_k": 2}, [0, 5 / 8, 0, 3 / 8]),
        ({"top_p": 0.9}, [3 / 19, 10 / 19, 0, 6 / 19]),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.8}, [0, 25 / 34, 0, 9 / 34]),
    ],
)
def test_frequencies_are_the_odds_worked_out_by_hand(how, odds):
    rng, odds = np.random.default_rng(2), np.array(odds)
    counts = np.bincount([sample(LOGITS, rng, **how) for _ in range(10_000)], minlength=4)
    assert counts[odds == 0].sum() == 0
    drawn = odds > 0
    assert chi_square(counts[drawn], odds[drawn]) < chi_square_bound(drawn.sum())


@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.6}, {"temperature": 1.7}, {"top_k": 9}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.6}],
)
def test_frequencies_are_the_probabilities(how):
    rng = np.random.default_rng(1)
    logits = rng.standard_normal(20)
    counts = np.bincount([sample(logits, rng, **how) for _ in range(10_000)], minlength=20)
    odds = probabilities(logits, **how)
    assert counts[odds == 0].sum() == 0
    drawn = odds > 0
    assert chi_square(counts[drawn], odds[drawn]) < chi_square_bound(drawn.sum())


def test_the_frequency_test_has_the_power_to_fail():
    rng = np.random.default_rng(1)
    logits = rng.standard_normal(20)
    counts = np.bincount([sample(logits, rng, temperature=0.8) for _ in range(10_000)], minlength=20)
    assert chi_square(counts, probabilities(logits)) > chi_square_bound(20)


def test_the_same_seed_draws_the_same_tokens():
    def draws(seed):
        rng = np.random.default_rng(seed)
        return [sample(LOGITS, rng) for _ in range(50)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)


# Nonsense


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_k": -3}, "top_k -3"),
        ({"top_k": 2.5}, "top_k 2.5"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": -0.5}, "top_p -0.5"),
        ({"top_p": 1.01}, "top_p 1.01"),
        ({"top_p": math.nan}, "top_p nan"),
    ],
)
def test_a_setting_out_of_range_is_named(how, named):
    with pytest.raises(UserError, match=named):
        sample(LOGITS, np.random.default_rng(0), **how)


@pytest.mark.parametrize("bad", [[0.0, math.nan], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_logits_of_a_diverged_model_are_refused(bad):
    with pytest.raises(UserError, match="diverged"):
        sample(np.array(bad), np.random.default_rng(0), temperature=0)
