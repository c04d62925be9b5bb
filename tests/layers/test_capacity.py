"""Capacity: first come, first served within each sequence, and what was refused adds nothing and is counted."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import drawn_mixture, mixture

from minimoe.layers import capacity, moe
from minimoe.layers.mode import Mode
from minimoe.layers.routing import Choice, experts_by_token


def test_capacity_serves_each_sequence_first_come_first_served() -> None:
    choices = np.array([[0, 0, 1, 0, 1, 0], [1, 1, 1, 1, 0, 1]])
    kept = capacity.within_capacity(choices, 2, 2)
    assert kept.tolist() == [[True, True, True, False, True, False], [True, True, False, False, True, False]]


def test_capacity_is_the_fair_share_times_the_factor_rounded_up(rng: np.random.Generator) -> None:
    """T 6, K 2, E 5: the fair share is 2.4 tokens."""
    config = mixture(noisy=False)
    params = drawn_mixture(rng, config)
    params.router.w_gate[:] = np.array([2.0, 1.0, 0.0, 0.0, 0.0])  # every token chooses experts 0 and 1
    x = abs(rng.standard_normal((2, 6, 4)))
    for factor, limit in ((1e-6, 1), (1.0, 3), (1.25, 3), (1.3, 4), (2.5, 6)):
        _, stats, dropped, cache = moe.forward(params, x, config, Mode(capacity_factor=factor))
        assert cache.routing.counts == [2 * limit, 2 * limit, 0, 0, 0]
        assert dropped == 2 * 2 * (6 - limit)
        assert stats.assignments.tolist() == [12, 12, 0, 0, 0], "the sums count what was wanted, not what was served"


def test_a_dropped_token_gets_nothing_from_that_expert_and_keeps_the_weight_of_the_other(
    rng: np.random.Generator,
) -> None:
    config = mixture(experts=2, active=2, noisy=False)
    params, x = drawn_mixture(rng, config), rng.standard_normal((1, 4, 4))
    y, _, dropped, _ = moe.forward(params, x, config, Mode(capacity_factor=0.5))
    whole, _, _, _ = moe.forward(params, x, config)
    assert dropped == 4
    np.testing.assert_allclose(y[0, :2], whole[0, :2], atol=1e-14)
    assert (y[0, 2:] == 0).all()


@pytest.mark.parametrize("padding", ["before", "behind"])
def test_padding_takes_no_place_from_tokens(padding: str, rng: np.random.Generator) -> None:
    """Two sequences of 6 and 4 tokens, alone and in rows of 9."""
    config = mixture()
    params, x, noise = drawn_mixture(rng, config), rng.standard_normal((2, 9, 4)), rng.standard_normal((2, 9, 5))
    places = [np.arange(9)[-length:] if padding == "before" else np.arange(length) for length in (6, 4)]
    mask = np.zeros((2, 9))
    for row, place in enumerate(places):
        mask[row, place] = 1
    y, stats, dropped, _ = moe.forward(params, x, config, Mode(noise=noise, capacity_factor=0.6, mask=mask))
    alone = [
        moe.forward(params, x[row, place][None], config, Mode(noise=noise[row, place][None], capacity_factor=0.6))
        for row, place in enumerate(places)
    ]
    for row, place in enumerate(places):
        np.testing.assert_allclose(y[row, place], alone[row].y[0], rtol=0, atol=1e-12)
    assert dropped == sum(one.dropped for one in alone) > 0
    np.testing.assert_allclose(stats.assignments, sum(one.stats.assignments for one in alone))


def test_capacity_gives_the_same_however_a_batch_is_split(rng: np.random.Generator) -> None:
    config = mixture()
    params, x, noise = drawn_mixture(rng, config), rng.standard_normal((4, 6, 4)), rng.standard_normal((4, 6, 5))
    whole, _, dropped, _ = moe.forward(params, x, config, Mode(noise=noise, capacity_factor=0.6))
    halves = np.split(np.arange(4), 2)
    parts = [moe.forward(params, x[b], config, Mode(noise=noise[b], capacity_factor=0.6)) for b in halves]
    np.testing.assert_allclose(np.concatenate([part.y for part in parts]), whole, atol=1e-14)
    assert sum(part.dropped for part in parts) == dropped > 0


def test_a_later_token_takes_no_place_from_an_earlier_one(rng: np.random.Generator) -> None:
    config = mixture()
    params, x = drawn_mixture(rng, config), rng.standard_normal((1, 6, 4))
    other = x.copy()
    other[0, 3:] = rng.standard_normal((3, 4))
    before, _, dropped, _ = moe.forward(params, x, config, Mode(capacity_factor=0.4))
    after, _, _, _ = moe.forward(params, other, config, Mode(capacity_factor=0.4))
    np.testing.assert_allclose(after[:, :3], before[:, :3], atol=1e-14)
    assert dropped > 0


def admitted_by_loops(experts: np.ndarray, count: int, factor: float, mask: np.ndarray) -> list[bool]:
    """One sequence (T, K) entry by entry, with one queue for each expert."""
    K = experts.shape[1]
    limit = math.ceil(factor * K * int(mask.sum()) / count)
    queues, kept = [0] * count, []
    for t in range(len(experts)):
        for e in experts[t]:
            kept.append(bool(mask[t]) and queues[e] < limit)
            queues[e] += int(mask[t])
    return kept


@given(
    batch=st.integers(1, 3),
    time=st.integers(1, 5),
    count=st.integers(1, 5),
    active=st.integers(1, 3),
    factor=st.sampled_from([1e-6, 0.5, 1.0, 1.25, 2.0, 1e6]),
    masked=st.booleans(),
    seed=st.integers(0, 999),
)
def test_admission_equals_a_loop_with_one_queue_for_each_expert(
    batch: int, time: int, count: int, active: int, factor: float, masked: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    K = min(active, count)
    experts = np.argsort(rng.random((batch, time, count)), axis=2)[:, :, :K]
    mask = rng.integers(2, size=(batch, time)) if masked else np.ones((batch, time))
    kept, asked = capacity.admit(experts, count, factor, mask if masked else None)
    assert kept.tolist() == [admitted_by_loops(experts[b], count, factor, mask[b]) for b in range(batch)]
    assert asked == K * mask.sum()
    weights = rng.random((batch * time, K))
    routing = capacity.limit(Choice(experts.reshape(-1, K), weights), batch, count, factor, mask if masked else None)
    assert sum(routing.counts) + routing.dropped == asked
    served = np.where(kept.reshape(-1, K), experts.reshape(-1, K), -1)
    assert (experts_by_token(routing) == served).all()


@pytest.mark.parametrize("mask", [None, np.array([[1, 1, 0]])])
def test_without_a_factor_nothing_is_dropped(mask: Any, rng: np.random.Generator) -> None:
    """Padding is then routed as tokens are: its result is not looked at."""
    choice = Choice(np.array([[0], [0], [0]]), rng.random((3, 1)))
    routing = capacity.limit(choice, 1, 4, None, mask)
    assert (routing.counts, routing.dropped) == ([3, 0, 0, 0], 0)


def test_the_entries_of_padding_are_left_out_but_not_counted_as_dropped() -> None:
    choice = Choice(np.array([[0], [0], [0], [1]]), np.ones((4, 1)))
    routing = capacity.limit(choice, 1, 2, 1.0, np.array([[0, 1, 1, 1]]))
    assert (routing.counts, routing.dropped) == ([2, 1], 0)
    assert routing.token.tolist() == [1, 2, 3]
