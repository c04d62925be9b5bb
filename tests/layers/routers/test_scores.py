"""What routers share: softmax, the largest of each row, sums over tokens and the way back through them."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minimoe.core import tree
from minimoe.layers.routers import scores
from minimoe.layers.routing import RouterStats
from minimoe.proof.gradcheck import check, failed


@given(tokens=st.integers(1, 5), experts=st.integers(1, 6), seed=st.integers(0, 99))
def test_softmax_and_log_sum_exp_are_their_definitions(tokens: int, experts: int, seed: int) -> None:
    z = 3 * np.random.default_rng(seed).standard_normal((tokens, experts))
    before = z.copy()
    probability, lse = scores.softmax(z)
    assert (probability.shape, lse.shape) == ((tokens, experts), (tokens, 1))
    for t in range(tokens):
        total = sum(math.exp(value) for value in z[t])
        np.testing.assert_allclose(probability[t], [math.exp(value) / total for value in z[t]], rtol=1e-13)
        assert lse[t, 0] == pytest.approx(math.log(total), abs=1e-13)
    assert (z == before).all()
    assert probability.flags.c_contiguous, "what follows takes whole rows of it"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softmax_of_any_finite_scores_is_finite(dtype: Any) -> None:
    probability, lse = scores.softmax(np.array([[1e30, -1e30, 0], [-1e30, -1e30, -1e30]], dtype))
    np.testing.assert_allclose(probability, [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]], rtol=1e-6)
    np.testing.assert_allclose(lse[:, 0], [1e30, -1e30], rtol=1e-6)
    assert probability.dtype == lse.dtype == dtype


@given(
    tokens=st.integers(1, 4),
    experts=st.sampled_from([1, 2, 5, 7, 8, 9, 16, 40, 64]),
    count=st.integers(1, 9),
    different=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@example(tokens=2, experts=64, count=3, different=1, seed=0)
@example(tokens=2, experts=64, count=9, different=2, seed=0)
@example(tokens=1, experts=1, count=1, different=1, seed=0)
def test_the_largest_come_first_and_the_lowest_of_equals_before_the_others(
    tokens: int, experts: int, count: int, different: int, seed: int
) -> None:
    """With few ``different`` scores most have an equal. Few of many are searched, others sorted: both must agree."""
    z = np.random.default_rng(seed).integers(different, size=(tokens, experts)).astype(float)
    before = z.copy()
    count = min(count, experts)
    expected = [sorted(range(experts), key=lambda e: (-row[e], e))[:count] for row in z]
    assert scores.largest(z, count).tolist() == expected
    assert (z == before).all()


def drawn(rng: np.random.Generator, tokens: int = 6, experts: int = 5) -> dict[str, np.ndarray]:
    """What a router hands over for its sums, each drawn apart from the others so that none can stand for another."""
    logits = rng.standard_normal((tokens, experts))
    probability, lse = scores.softmax(logits)
    chosen = rng.integers(2, size=(tokens, experts)).astype(float)
    gated, counted = rng.random((2, tokens, experts))
    return {
        "logits": logits, "probability": probability, "lse": lse, "chosen": chosen, "gated": gated, "counted": counted,
    }  # fmt: skip


@pytest.mark.parametrize("mask", [None, np.array([1.0, 0, 1, 1, 0, 1])[:, None], np.zeros((6, 1))])
def test_the_sums_are_loops_over_the_tokens_that_count(mask: Any, rng: np.random.Generator) -> None:
    given_ = drawn(rng)
    stats = scores.sums(**given_, mask=mask)
    present = [t for t in range(6) if mask is None or mask[t, 0]]
    expected = {name: np.zeros(5) for name in ("assignments", "probability", "importance", "load")}
    squared_lse = entropy = 0.0
    for t in present:
        for name, source in (("assignments", "chosen"), ("importance", "gated"), ("load", "counted")):
            expected[name] += given_[source][t]
        p = [math.exp(value) for value in given_["logits"][t]]
        total = sum(p)
        p = [value / total for value in p]
        expected["probability"] += p
        squared_lse += math.log(total) ** 2
        entropy -= sum(value * math.log(value) for value in p)
    for name, sums in expected.items():
        np.testing.assert_allclose(getattr(stats, name), sums, atol=1e-13, err_msg=name)
    assert stats.tokens == len(present)
    assert stats.squared_lse == pytest.approx(squared_lse, abs=1e-12)
    assert stats.entropy == pytest.approx(entropy, abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_sums_follow_the_dtype(dtype: Any, rng: np.random.Generator) -> None:
    stats = scores.sums(**{name: value.astype(dtype) for name, value in drawn(rng).items()}, mask=None)
    assert {leaf.dtype for leaf in stats[1:]} == {np.dtype(dtype)}


@given(
    tokens=st.integers(1, 5),
    experts=st.integers(1, 5),
    masked=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 3.0]),
    seed=st.integers(0, 999),
)
@example(tokens=1, experts=1, masked=False, scale=1.0, seed=0)
def test_the_way_back_through_the_sums_is_right(
    tokens: int, experts: int, masked: bool, scale: float, seed: int
) -> None:
    """By finite differences, for any gradient with respect to Σp, Σ lse² and the balance within sequences."""
    rng = np.random.default_rng(seed)
    mask = rng.integers(2, size=(tokens, 1)).astype(float) if masked else None
    nothing = np.zeros((tokens, experts))
    shares = rng.random((1, experts))

    def forward(params: None, logits: np.ndarray) -> tuple[Any, Any]:
        probability, lse = scores.softmax(logits)
        stats = scores.sums(logits, probability, lse, nothing, nothing, nothing, mask, shares)
        return (stats.probability, stats.squared_lse, stats.by_sequence), (probability, lse)

    def backward(params: None, cache: Any, dy: Any) -> tuple[Any, Any]:
        zero = np.zeros(experts)
        dstats = RouterStats(0, zero, dy[0], zero, zero, dy[1], dy[2], np.zeros(()))
        return scores.sums_backward(*cache, dstats, mask, shares), None

    logits = scale * rng.standard_normal((tokens, experts))
    rows = check("sums", forward, backward, None, logits, entries=25, directions=2)
    assert failed(rows) == []


@pytest.mark.parametrize("masked", [False, True])
def test_the_balance_within_a_sequence_uses_its_own_shares(masked: bool, rng: np.random.Generator) -> None:
    given_ = drawn(rng, tokens=6)
    mask = np.array([1.0, 0, 1, 1, 1, 0])[:, None] if masked else None
    shares = scores.shares_by_sequence(given_["chosen"], 2, mask)
    expected = 0.0
    for sequence in ([0, 1, 2], [3, 4, 5]):
        real = [t for t in sequence if mask is None or mask[t, 0]]
        counts = sum(given_["chosen"][t] for t in real)
        expected += 5 * sum(counts / counts.sum() * sum(given_["probability"][t] for t in real))
    assert scores.sums(**given_, mask=mask, shares=shares).by_sequence == pytest.approx(expected)
    assert scores.sums(**given_, mask=mask).by_sequence == 0


def test_a_sequence_that_chose_nothing_has_no_shares_and_no_warning() -> None:
    assert (scores.shares_by_sequence(np.zeros((4, 3)), 2, None) == 0).all()


@pytest.mark.parametrize("which", ["probability", "squared_lse"])
def test_each_sum_alone_reaches_the_logits_and_no_padding(which: str, rng: np.random.Generator) -> None:
    given_, mask = drawn(rng), np.array([1.0, 0, 1, 1, 0, 1])[:, None]
    zero = tree.map(np.zeros_like, scores.sums(**given_, mask=mask)._replace(tokens=np.array(0)))
    dstats = zero._replace(**{which: rng.standard_normal(getattr(zero, which).shape)})
    dlogits = scores.sums_backward(given_["probability"], given_["lse"], dstats, mask)
    assert dlogits[mask[:, 0] > 0].any(1).all()
    assert (dlogits[mask[:, 0] == 0] == 0).all()


def test_a_gradient_meant_once_for_each_token_skips_padding() -> None:
    gradient, mask = np.array([[1.0, 2.0]]), np.array([[1.0], [0.0]])
    assert scores.once_per_token(gradient, None) is gradient
    assert scores.once_per_token(gradient, mask).tolist() == [[1, 2], [0, 0]]


def test_a_table_of_choices_is_as_wide_as_the_token_with_the_most_and_never_without_a_column() -> None:
    taken = np.array([[False, True, False, True], [False, False, False, False], [True, True, False, True]])
    weights = np.array([[9.0, 0.0, 9.0, 2.0], [9.0, 9.0, 9.0, 9.0], [1.0, 3.0, 9.0, 0.0]])  # a weight may be 0
    choice, kept = scores.choice_of(taken, weights)
    assert kept.tolist() == [[True, True, False], [False, False, False], [True, True, True]]
    assert choice.experts[0, :2].tolist() == [3, 1]
    assert choice.experts[2].tolist() == [1, 0, 3]
    np.testing.assert_array_equal(choice.weights[kept], [2, 0, 3, 1, 0])
    for nothing in (np.zeros((3, 4), bool), np.zeros((0, 4), bool)):
        choice, kept = scores.choice_of(nothing, np.ones(nothing.shape))
        assert choice.experts.shape == kept.shape == (len(nothing), 1)
        assert not kept.any()
