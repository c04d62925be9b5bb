"""Policies of a cache of experts: against brute force, against each other, and against chance."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.analysis import cache_policies
from minimoe.analysis.cache_policies import POLICIES, by_layers, distinct, even, hit_rate
from minimoe.core.errors import UserError

traces = st.tuples(st.integers(1, 3), st.integers(0, 999), st.integers(1, 30))


def drawn(together: int, seed: int, tokens: int, experts: int = 6) -> np.ndarray:
    return even(np.random.default_rng(seed), tokens, experts, together)


def best_by_trying(rows: list[list[int]], slots: int) -> int:
    """The most hits that any choice of what to keep can give: every set that can be in memory after each token."""
    states = {frozenset[int](): 0}
    for row in rows:
        after: dict[frozenset[int], int] = {}
        for held, hits in states.items():
            now = hits + len(held & set(row))
            rest = held - set(row)
            room = slots - len(row)
            for kept in itertools.combinations(sorted(rest), min(room, len(rest))):
                key = frozenset(kept) | frozenset(row)
                after[key] = max(after.get(key, -1), now)
        states = after
    return max(states.values())


@given(trace=traces, more=st.integers(0, 2))
def test_the_oracle_is_the_best_that_any_choice_can_give(trace: tuple[int, int, int], more: int) -> None:
    experts = drawn(*trace, experts=5)[:12]
    slots = experts.shape[1] + more
    most = best_by_trying(experts.tolist(), slots)
    rates = {policy: hit_rate(experts, slots, policy) for policy in POLICIES}
    assert rates["oracle"] * experts.size == pytest.approx(most)
    assert max(rates.values()) == rates["oracle"]
    assert rates["nothing"] == 0


@given(trace=traces, more=st.integers(0, 4))
def test_lru_and_fifo_are_what_their_names_say(trace: tuple[int, int, int], more: int) -> None:
    experts = drawn(*trace)
    slots = experts.shape[1] + more
    for policy in ("lru", "fifo"):
        queue: list[int] = []
        hits = 0
        for row in experts.tolist():
            for expert in row:
                if expert in queue:
                    hits += 1
                    if policy == "lru":
                        queue.remove(expert)
                        queue.append(expert)
                    continue
                if len(queue) >= slots:
                    queue.remove(next(one for one in queue if one not in row))
                queue.append(expert)
        assert hit_rate(experts, slots, policy) == pytest.approx(hits / experts.size)


def test_by_hand() -> None:
    rows = [[0], [1], [0], [2], [1], [0]]
    assert {policy: 6 * hit_rate(rows, 2, policy) for policy in ("nothing", "fifo", "lru", "oracle")} == {
        "nothing": 0, "fifo": 2, "lru": 1, "oracle": 2,
    }  # fmt: skip


@pytest.mark.parametrize("policy", ["random", "fifo", "lru"])
def test_evenly_drawn_experts_are_found_as_often_as_chance_says(policy: str) -> None:
    """S of E are in memory, whatever is kept; with K = 1 that is exact."""
    assert hit_rate(drawn(1, 0, 20_000, 8), 3, policy) == pytest.approx(3 / 8, abs=0.012)


def test_random_depends_on_the_seed_and_on_nothing_else() -> None:
    experts = drawn(2, 1, 300)
    rates = [hit_rate(experts, 3, "random", seed) for seed in (0, 0, 1)]
    assert rates[0] == rates[1] != rates[2]


def test_room_for_all_leaves_only_the_first_reads() -> None:
    experts = drawn(2, 1, 300)
    for policy in POLICIES[1:]:
        assert hit_rate(experts, 6, policy) == pytest.approx(1 - 6 / 600)


def test_layers_with_shares_behave_like_caches_of_their_own() -> None:
    experts = np.stack([drawn(2, seed, 400, 8) for seed in range(4)])
    for own in (2, 3, 5):
        together = by_layers(experts, 4 * own + 2, shares=True)
        alone = [hit_rate(layer, own + 2, "lru") for layer in experts]  # the two that belong to no layer are at work
        less = [hit_rate(layer, own, "lru") for layer in experts]
        assert np.mean(less) - 0.02 < together <= np.mean(alone)
    assert by_layers(experts, 7, shares=False) < 0.08 < by_layers(experts, 7, shares=True)
    assert by_layers(experts, 32, shares=False) == by_layers(experts, 32, shares=True) > 0.98


def test_the_experts_that_a_batch_needs() -> None:
    experts = np.array([[0, 1], [1, 2], [3, 4], [3, 4], [5, 5]])
    assert distinct(experts, 1) == pytest.approx(9 / 5)
    assert distinct(experts, 2) == pytest.approx((3 + 2) / 2)  # the last token fills no batch
    many = drawn(2, 0, 60_000, 8)
    for batch in (1, 4, 30):
        assert distinct(many, batch) == pytest.approx(8 * (1 - (1 - 2 / 8) ** batch), rel=0.01)


def test_even_choices_are_even_and_never_the_same_expert_twice() -> None:
    experts = drawn(3, 5, 20_000, 6)
    assert (np.sort(experts, 1)[:, 1:] > np.sort(experts, 1)[:, :-1]).all()
    np.testing.assert_allclose(np.bincount(experts.ravel()) / experts.size, 1 / 6, atol=0.01)


def test_bad_input_is_refused() -> None:
    with pytest.raises(UserError, match="no policy 'mru'"):
        hit_rate([[0]], 1, "mru")
    with pytest.raises(UserError, match="slots 1 do not hold the 2 experts"):
        hit_rate([[0, 1]], 1, "lru")
    assert cache_policies.hit_rate([], 1, "lru") == 0
