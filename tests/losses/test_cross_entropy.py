"""Cross-entropy: a sum over the tokens that count, and how many those are."""

import math
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minimoe.losses import cross_entropy
from minimoe.proof.gradcheck import check, failed


@given(
    tokens=st.integers(1, 5),
    vocabulary=st.integers(1, 6),
    masked=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_gradient_is_right_with_and_without_a_mask(
    tokens: int, vocabulary: int, masked: bool, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    targets = rng.integers(vocabulary, size=tokens)
    mask = rng.integers(2, size=tokens) if masked else None

    def forward(params: None, x: np.ndarray) -> tuple[Any, Any]:
        (total, _), cache = cross_entropy.forward(x, targets, mask)
        return total, cache

    def backward(params: None, cache: Any, dy: np.ndarray) -> tuple[Any, None]:
        return cross_entropy.backward(cache, dy), None

    x = scale * rng.standard_normal((tokens, vocabulary))
    assert failed(check("cross-entropy", forward, backward, None, x)) == []


def test_knowing_nothing_costs_log_v_a_token() -> None:
    (total, tokens), _ = cross_entropy.forward(np.zeros((2, 3, 7)), np.zeros((2, 3), int))
    assert math.isclose(total, 6 * math.log(7), rel_tol=1e-14)
    assert tokens == 6


def test_a_loss_worked_out_by_hand() -> None:
    logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]) + 3.0
    (total, _), cache = cross_entropy.forward(logits, np.array([1, 2]))
    assert math.isclose(total, -math.log(0.25) - math.log(0.7), rel_tol=1e-14)
    np.testing.assert_allclose(
        cross_entropy.backward(cache, 0.5), 0.5 * np.array([[0.5, -0.75, 0.25], [0.1, 0.2, -0.3]]), atol=1e-15
    )


def test_masked_tokens_count_for_nothing(rng: np.random.Generator) -> None:
    logits, targets = rng.standard_normal((2, 3, 5)), rng.integers(5, size=(2, 3))
    mask = np.array([[1, 1, 0], [0, 1, 1]])
    (total, tokens), cache = cross_entropy.forward(logits, targets, mask)
    keep = mask.astype(bool)
    (expected, count), _ = cross_entropy.forward(logits[keep], targets[keep])
    assert math.isclose(total, expected, rel_tol=1e-14)
    assert tokens == count == 4
    assert (cross_entropy.backward(cache, 1.0)[~keep.reshape(-1)] == 0).all()


def test_extreme_logits_stay_finite_and_right() -> None:
    logits = np.array([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0]], np.float32)
    (total, _), cache = cross_entropy.forward(logits, np.array([0, 1]))
    assert total == 2e4
    assert cross_entropy.backward(cache, 1.0).tolist() == [[0, 0, 0], [1, -1, 0]]


def test_the_gradient_of_each_token_sums_to_zero(rng: np.random.Generator) -> None:
    _, cache = cross_entropy.forward(rng.standard_normal((4, 9)), rng.integers(9, size=4))
    np.testing.assert_allclose(cross_entropy.backward(cache, 1.0).sum(1), 0, atol=1e-15)


def test_forward_leaves_the_logits_alone(rng: np.random.Generator) -> None:
    logits = rng.standard_normal((4, 9))
    before = logits.copy()
    cross_entropy.forward(logits, np.zeros(4, int))
    assert (logits == before).all()
