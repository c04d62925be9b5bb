"""The assignment problem: against every permutation, and for any size by the prices that prove the result."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.compression.assignment import Assignment, assign
from minimoe.core.errors import UserError


def proved(cost: np.ndarray) -> Assignment:
    """The assignment of these costs, if its own prices prove it: weak duality, with equality."""
    found = assign(cost)
    n = len(cost)
    scale = max(abs(cost).max(initial=0), 1)
    assert sorted(found.columns.tolist()) == list(range(n)), "each column once"
    assert (cost - found.u[:, None] - found.v >= -1e-12 * n * scale).all(), "no reduced cost is negative"
    assert cost[np.arange(n), found.columns].sum() == pytest.approx(found.cost, abs=1e-12 * n * scale)
    return found


@given(n=st.integers(0, 5), whole=st.booleans(), seed=st.integers(0, 2**16))
def test_no_permutation_costs_less(n: int, whole: bool, seed: int) -> None:
    """Whole numbers from a small range make ties."""
    rng = np.random.default_rng(seed)
    cost = rng.integers(-2, 3, (n, n)).astype(float) if whole else rng.standard_normal((n, n))
    least = min(sum(cost[i, p[i]] for i in range(n)) for p in itertools.permutations(range(n)))
    assert proved(cost).cost == pytest.approx(least, abs=1e-12)


@given(n=st.integers(1, 40), kind=st.sampled_from(["normal", "ties", "product", "large"]), seed=st.integers(0, 2**16))
def test_the_prices_prove_the_result_at_any_size(n: int, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, n))
    costs = {
        "normal": rng.standard_normal((n, n)),
        "ties": rng.integers(0, 3, (n, n)).astype(float),
        "product": np.outer(a, b),  # the hardest kind: paths are long
        "large": 1e8 * rng.standard_normal((n, n)),
    }
    proved(costs[kind])


def test_a_row_gives_way_to_one_that_needs_its_column_more() -> None:
    """Row by row, each taking the cheapest free column, would cost 1 + 9 + 9."""
    cost = np.array([[1.0, 2, 9], [1, 9, 9], [9, 1, 9]])
    found = proved(cost)
    assert (found.columns.tolist(), found.cost) == ([2, 0, 1], 11)


def test_a_permutation_is_found_again(rng: np.random.Generator) -> None:
    vectors, order = rng.standard_normal((50, 8)), rng.permutation(50)
    np.testing.assert_array_equal(assign(-vectors @ vectors[order].T).columns, np.argsort(order))


@pytest.mark.parametrize("shape", [(2, 3), (3,), (2, 2, 2)])
def test_costs_that_are_not_square_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="not a square matrix: give a row and a column for each pair"):
        assign(np.zeros(shape))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_costs_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(UserError, match=f"a cost is {bad}: give finite costs"):
        assign(np.array([[0, bad], [1, 1]]))
