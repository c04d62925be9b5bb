"""The sorted routing against plain double loops over tokens and experts, with and without entries left out."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minimoe.core.errors import UserError
from minimoe.layers.routing import (
    Choice,
    Routing,
    by_token,
    combine,
    experts_by_token,
    from_choice,
    skip_second,
    sort_by_expert,
)

D = 3


class Case(NamedTuple):
    """N tokens with K entries each, for E experts. Every sum is of small whole numbers, so that equal means equal."""

    experts: np.ndarray  # (N, K)  two entries of one token may name the same expert
    weights: np.ndarray  # (N, K)
    count: int  # E
    kept: np.ndarray  # (N, K) bools

    @property
    def choice(self) -> Choice:
        return Choice(self.experts, self.weights)

    def sorted_entries(self) -> list[tuple[int, int]]:
        """(t, k) of every entry that is kept: by expert, then by token, then best first."""
        N, K = self.experts.shape
        every = [(t, k) for e in range(self.count) for t in range(N) for k in range(K) if self.experts[t, k] == e]
        return [(t, k) for t, k in every if self.kept[t, k]]


def made(experts: list[list[int]], count: int, kept: list[list[bool]] | None = None) -> Case:
    choice = np.array(experts)
    weights = 1.0 + np.arange(choice.size).reshape(choice.shape)  # all different
    return Case(choice, weights, count, np.ones(choice.shape, bool) if kept is None else np.array(kept))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    N, K, E = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    experts = draw(st.lists(st.lists(st.integers(0, E - 1), min_size=K, max_size=K), min_size=N, max_size=N))
    entry = draw(st.sampled_from([st.booleans(), st.just(True), st.just(False)]))
    return made(experts, E, draw(st.lists(st.lists(entry, min_size=K, max_size=K), min_size=N, max_size=N)))


ONE_EXPERT_FOR_EACH_TOKEN = made([[2], [0], [2], [1]], 3)
AN_EXPERT_WITHOUT_ENTRIES = made([[0, 3], [3, 0], [0, 1]], 5)
SOME_DROPPED = made([[0, 1], [1, 0], [1, 2]], 3, [[True, False], [True, True], [False, False]])
EVERYTHING_DROPPED = made([[0, 1], [1, 0]], 2, [[False, False], [False, False]])
NAMED = {
    "one expert for each token": ONE_EXPERT_FOR_EACH_TOKEN,
    "an expert without entries": AN_EXPERT_WITHOUT_ENTRIES,
    "some dropped": SOME_DROPPED,
    "everything dropped": EVERYTHING_DROPPED,
}


def routing_of(case: Case) -> Routing:
    return from_choice(case.choice, case.count, case.kept.reshape(-1))


@given(case=cases())
@example(case=ONE_EXPERT_FOR_EACH_TOKEN)
@example(case=AN_EXPERT_WITHOUT_ENTRIES)
@example(case=SOME_DROPPED)
@example(case=EVERYTHING_DROPPED)
def test_sorting_is_stable_and_leaves_out_what_is_not_kept(case: Case) -> None:
    dispatch = sort_by_expert(case.experts, case.count, case.kept)
    entries, K = case.sorted_entries(), case.experts.shape[1]
    assert dispatch.counts == [int(((case.experts == e) & case.kept).sum()) for e in range(case.count)]
    assert dispatch.token.tolist() == [t for t, _ in entries]
    assert dispatch.order.tolist() == [t * K + k for t, k in entries]
    assert dispatch.place.shape == case.experts.shape
    for t, k in np.ndindex(case.experts.shape):
        assert dispatch.place[t, k] == (entries.index((t, k)) if case.kept[t, k] else len(entries))
    assert all(type(number) is int for number in dispatch.counts)


@given(case=cases())
@example(case=ONE_EXPERT_FOR_EACH_TOKEN)
@example(case=AN_EXPERT_WITHOUT_ENTRIES)
@example(case=SOME_DROPPED)
@example(case=EVERYTHING_DROPPED)
def test_a_routing_holds_the_kept_entries_of_a_choice_and_gives_them_back_by_token(case: Case) -> None:
    routing, entries = routing_of(case), case.sorted_entries()
    M = len(entries)
    assert (sum(routing.counts), routing.token.shape, routing.weight.shape) == (M, (M,), (M,))
    assert routing.token.tolist() == [t for t, _ in entries]
    assert routing.weight.tolist() == [case.weights[t, k] for t, k in entries]
    assert experts_by_token(routing).tolist() == np.where(case.kept, case.experts, -1).tolist()
    assert by_token(routing.weight, routing.place).tolist() == np.where(case.kept, case.weights, 0).tolist()


@given(case=cases(), seed=st.integers(0, 99))
@example(case=ONE_EXPERT_FOR_EACH_TOKEN, seed=0)
@example(case=AN_EXPERT_WITHOUT_ENTRIES, seed=0)
@example(case=SOME_DROPPED, seed=0)
@example(case=EVERYTHING_DROPPED, seed=0)
def test_rows_come_back_to_their_tokens_as_in_a_double_loop(case: Case, seed: int) -> None:
    """``by_token`` of rows, and ``combine`` with and without weights."""
    rng = np.random.default_rng(seed)
    routing, entries, shape = routing_of(case), case.sorted_entries(), case.experts.shape
    rows = rng.integers(-9, 9, size=(len(entries), D)).astype(float)
    weights = rng.integers(-9, 9, size=shape).astype(float)
    apart, plain, weighted = np.zeros((*shape, D)), np.zeros((shape[0], D)), np.zeros((shape[0], D))
    for row, (t, k) in zip(rows, entries, strict=True):
        apart[t, k] = row
        plain[t] += row
        weighted[t] += weights[t, k] * row
    before = rows.copy(), weights.copy()
    assert (by_token(rows, routing.place) == apart).all()
    assert (combine(rows, routing.place) == plain).all()
    assert (combine(rows, routing.place, weights) == weighted).all()
    assert (rows == before[0]).all() and (weights == before[1]).all(), "the arguments stay as they are"


@given(case=cases())
def test_no_list_of_kept_entries_keeps_them_all(case: Case) -> None:
    everything = from_choice(case.choice, case.count, np.ones(case.experts.size, bool))
    routing = from_choice(case.choice, case.count)
    assert routing.counts == everything.counts
    assert (routing.token == everything.token).all()
    assert (routing.weight == everything.weight).all()
    assert (routing.place == everything.place).all()
    assert routing.dropped == 0


def test_the_number_of_dropped_entries_is_the_caller_s() -> None:
    assert from_choice(SOME_DROPPED.choice, 3, SOME_DROPPED.kept.reshape(-1), 3).dropped == 3


def test_a_routing_whose_tokens_have_different_numbers_of_entries_needs_no_choice() -> None:
    """Made expert by expert, as expert-choice routing does it: expert 0 takes tokens 2 and 0, expert 1 token 2."""
    routing = Routing([2, 1], np.array([2, 0, 2]), np.array([0.5, 0.25, 0.125]), np.array([[1, 3], [3, 3], [0, 2]]))
    assert experts_by_token(routing).tolist() == [[0, -1], [-1, -1], [0, 1]]
    assert by_token(routing.weight, routing.place).tolist() == [[0.25, 0], [0, 0], [0.5, 0.125]]
    assert combine(np.array([[1.0], [10.0], [100.0]]), routing.place).tolist() == [[10], [0], [101]]


@pytest.mark.parametrize("case", NAMED.values(), ids=NAMED)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_keep_their_dtype(case: Case, dtype: type) -> None:
    routing = routing_of(case._replace(weights=case.weights.astype(dtype)))
    weights = by_token(routing.weight, routing.place)
    rows = np.ones((sum(routing.counts), D), dtype)
    assert {routing.weight.dtype, weights.dtype, combine(rows, routing.place, weights).dtype} == {np.dtype(dtype)}


def test_a_weak_second_expert_is_skipped_and_the_first_takes_its_weight():
    experts = np.array([[2, 0], [1, 2], [0, 3]])
    weights = np.array([[0.75, 0.25], [0.6, 0.4], [0.8, 0.1]])
    made = skip_second(from_choice(Choice(experts, weights), 4), below=0.5)
    assert made.counts == [1, 1, 2, 0]
    np.testing.assert_array_equal(experts_by_token(made), [[2, -1], [1, 2], [0, -1]])
    np.testing.assert_allclose(by_token(made.weight, made.place), [[1, 0], [0.6, 0.4], [0.9, 0]])


def test_a_second_expert_of_just_the_ratio_is_kept_and_a_missing_one_stays_missing():
    experts, weights = np.array([[0, 1], [1, 2]]), np.array([[0.5, 0.25], [1.0, 0.5]])
    whole = from_choice(Choice(experts, weights), 3, np.array([True, True, True, False]), dropped=1)
    made = skip_second(whole, below=0.5)
    np.testing.assert_array_equal(experts_by_token(made), [[0, 1], [1, -1]])
    np.testing.assert_allclose(by_token(made.weight, made.place), [[0.5, 0.25], [1, 0]])
    assert made.dropped == 1


@pytest.mark.parametrize("K", [1, 3])
def test_only_the_second_of_two_experts_can_be_skipped(K: int):
    whole = from_choice(Choice(np.zeros((2, K), int), np.full((2, K), 0.5)), 4)
    with pytest.raises(UserError, match=f"a token has {K} experts here"):
        skip_second(whole, below=0.5)
