"""The auxiliary losses: their values in words, their gradients by every sum, and what pooling layers would hide."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core import tree
from minimoe.layers.routing import RouterStats
from minimoe.losses import balance
from minimoe.losses.balance import Coefficients
from minimoe.proof.gradcheck import check, failed

EACH = [Coefficients(**{name: 1.0}) for name in Coefficients._fields]


def stats_of(assignments: Any, probability: Any, tokens: int, squared_lse: float = 0.0) -> RouterStats:
    counts, p = np.asarray(assignments, float), np.asarray(probability, float)
    return RouterStats(tokens, counts, p, p, counts, np.asarray(squared_lse), np.zeros(()), np.zeros(()))


def uniform(tokens: int, experts: int, top_k: int) -> RouterStats:
    return stats_of(np.full(experts, tokens * top_k / experts), np.full(experts, tokens / experts), tokens)


@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_perfect_balance_scores_one_for_any_number_of_active_experts(top_k: int) -> None:
    losses, _ = balance.loss(uniform(40, 8, top_k), Coefficients())
    assert losses.balance == pytest.approx(1.0, abs=1e-14)
    assert losses.importance == losses.load == 0


def test_one_expert_for_all_scores_e() -> None:
    losses, _ = balance.loss(stats_of([10, 0, 0, 0], [10, 0, 0, 0], 10), Coefficients())
    assert losses.balance == 4.0
    assert losses.importance == losses.load == 3.0  # CV² of (v, 0, 0, 0)


def test_anti_correlated_shares_score_below_one() -> None:
    """The balanced value is no floor: f and p̄ are different things."""
    losses, _ = balance.loss(stats_of([10, 0], [4, 6], 10), Coefficients())
    assert losses.balance == pytest.approx(0.8)


def test_pooled_over_layers_collapse_is_hidden() -> None:
    """Four layers, each collapsed on another pair of 8 experts: 4 by layer, a perfect 1 in the pool."""
    layers = []
    for pair in range(4):
        used = np.zeros(8)
        used[2 * pair : 2 * pair + 2] = 1
        layers.append(stats_of(10 * used, 5 * used, 10))
    assert [balance.loss(layer, Coefficients())[0].balance for layer in layers] == [4.0] * 4
    assert balance.loss(tree.add(*layers), Coefficients())[0].balance == 1.0
    assert balance.pooled(layers, 1.0)[0] == 2.0, "the perfect K of that form"


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_pooled_form_is_k_times_ours_where_there_is_one_layer(rng: np.random.Generator, top_k: int) -> None:
    counts = rng.multinomial(10 * top_k, np.ones(5) / 5)
    stats = stats_of(counts, rng.uniform(1, 3, 5), 10)
    losses, gradient = balance.loss(stats, Coefficients(balance=0.3))
    value, pooled_gradient = balance.pooled([stats], 0.3)
    assert value == pytest.approx(top_k * losses.balance, rel=1e-14)
    np.testing.assert_allclose(pooled_gradient.probability, top_k * gradient.probability, rtol=1e-14)
    assert balance.pooled([uniform(30, 5, top_k)] * 2, 1.0)[0] == pytest.approx(top_k, rel=1e-14)


def test_gradient_of_the_pooled_form_is_the_same_for_every_layer(rng: np.random.Generator) -> None:
    counts = rng.integers(1, 6, (3, 4))

    def forward(params: None, probability: list[np.ndarray]) -> tuple[Any, Any]:
        layers = [stats_of(c, p, 7) for c, p in zip(counts, probability, strict=True)]
        value, gradient = balance.pooled(layers, 1.0)
        return value, gradient

    def backward(params: None, gradient: RouterStats, dy: Any) -> tuple[Any, None]:
        return [dy * gradient.probability] * 3, None

    rows = check("pooled", forward, backward, None, list(rng.uniform(1, 3, (3, 4))))
    assert failed(rows) == []
    _, gradient = balance.pooled([uniform(8, 4, 1)], 1.0)
    assert not any(np.any(leaf) for leaf in tree.leaves(gradient._replace(probability=None)))


def test_the_z_loss_is_the_mean_square_of_log_sum_exp() -> None:
    losses, gradient = balance.loss(stats_of([3, 3], [3, 3], 6, squared_lse=24.0), Coefficients(z=0.5))
    assert losses.z == 4.0
    assert gradient.squared_lse == 0.5 / 6


@pytest.mark.parametrize("coefficients", EACH, ids=Coefficients._fields)
@given(experts=st.integers(1, 6), seed=st.integers(0, 99))
def test_gradient_of_each_loss_by_each_sum_is_right(coefficients: Coefficients, experts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stats = RouterStats(
        tokens=np.array(9),
        assignments=rng.integers(5, size=experts),
        probability=rng.uniform(0.1, 2, experts),
        importance=rng.uniform(0.1, 2, experts),
        load=rng.uniform(0.1, 2, experts),
        squared_lse=rng.uniform(0, 9, ()),
        by_sequence=rng.uniform(0, 9, ()),
        entropy=np.array(0),
    )

    def forward(params: None, stats: RouterStats) -> tuple[Any, Any]:
        losses, gradient = balance.loss(stats, coefficients)
        return balance.weighted(losses, coefficients), gradient

    def backward(params: None, gradient: RouterStats, dy: Any) -> tuple[RouterStats, None]:
        return tree.map(lambda sum: sum * dy, gradient), None

    rows = check("balance", forward, backward, None, stats)
    assert failed(rows) == []
    assert [row.tensor for row in rows] == ["x.probability", "x.importance", "x.load", "x.squared_lse", "x.by_sequence"]


@given(v=st.lists(st.floats(0.01, 100), min_size=1, max_size=8), scale=st.sampled_from([1e-3, 1e3]))
def test_squared_variation_knows_shape_but_not_size(v: list[float], scale: float) -> None:
    values = np.array(v)
    cv2, gradient = balance.squared_variation(values)
    assert cv2 == pytest.approx(values.var() / values.mean() ** 2, abs=1e-14)
    assert balance.squared_variation(scale * values)[0] == pytest.approx(cv2, rel=1e-9, abs=1e-12)
    assert (values * gradient).sum() == pytest.approx(0, abs=1e-9), "so growing all of it gains nothing"


def test_sums_of_zero_tokens_give_zero_and_no_warning() -> None:
    losses, gradient = balance.loss(stats_of(np.zeros(4), np.zeros(4), 0), Coefficients(1, 1, 1, 1, 1))
    assert [float(loss) for loss in losses] == [0, 0, 0, 0, 0]
    assert not gradient.probability.any()
    assert not gradient.importance.any()
    assert not gradient.load.any()
    assert np.isfinite([gradient.squared_lse, gradient.by_sequence]).all()


def test_weighted_adds_each_loss_with_its_own_coefficient() -> None:
    losses = balance.Losses(*(np.asarray(value) for value in (1.0, 10.0, 100.0, 1000.0, 10_000.0)))
    assert balance.weighted(losses, Coefficients(balance=1, importance=2, load=3, z=4, sequence=5)) == 54321
    assert balance.weighted(losses, Coefficients()) == 0


def test_a_coefficient_of_zero_sends_nothing_back() -> None:
    _, gradient = balance.loss(stats_of([4, 1], [3, 2], 5, squared_lse=7.0), Coefficients())
    assert not any(np.any(leaf) for leaf in tree.leaves(gradient))


def test_the_pooled_form_takes_the_weights_of_the_experts_too(rng: np.random.Generator) -> None:
    """In the value and in the gradient, as the form of single layers does."""
    counts = rng.integers(1, 9, 5).astype(float)
    stats = uniform(30, 5, 2)._replace(probability=rng.uniform(1, 3, 5), assignments=counts)
    weights = [1.0, 1.0, 0.5, 0.25, 2.0]
    value, gradient = balance.pooled([stats], 0.3, weights)
    expected = 5 * (np.array(weights) * counts / 30 * stats.probability / 30)
    assert float(value) == pytest.approx(expected.sum())
    np.testing.assert_allclose(gradient.probability, 0.3 * expected / stats.probability)


def test_an_expert_that_costs_less_weighs_less_in_the_loss_and_in_its_gradient() -> None:
    stats, weights = stats_of([4, 2, 2], [3.0, 2.0, 3.0], 8), [1.0, 0.5, 2.0]
    losses, gradient = balance.loss(stats, Coefficients(balance=0.3), weights)
    shares = np.array(weights) * [0.5, 0.25, 0.25]
    assert losses.balance == pytest.approx(3 * (shares * stats.probability).sum() / 8)
    np.testing.assert_allclose(gradient.probability, 0.3 * 3 / 8 * shares)
