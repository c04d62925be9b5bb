"""RoPE: a rotation, so lengths stay, distances count and backward is the way back."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minimoe.layers import rope
from minimoe.layers.rope import Rotation
from minimoe.proof.gradcheck import check, failed


def rotation_of(positions: list[int], head_width: int, theta: float = 10_000.0) -> Rotation:
    return rope.init(np.array(positions), head_width, theta, np.float64)


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 3)),
    pairs=st.integers(1, 4),
    start=st.integers(0, 1000),
)
def test_gradient_is_right_for_any_shape(shape: tuple[int, int, int], pairs: int, start: int) -> None:
    rotation = rotation_of(list(range(start, start + shape[1])), 2 * pairs)
    x = np.random.default_rng(start).standard_normal((*shape, 2 * pairs))

    def forward(params: None, x: np.ndarray) -> tuple[np.ndarray, None]:
        return rope.forward(rotation, x), None

    def backward(params: None, cache: None, dy: np.ndarray) -> tuple[np.ndarray, None]:
        return rope.backward(rotation, dy), None

    assert failed(check("rope", forward, backward, None, x)) == []


def test_the_angles_are_those_of_the_paper() -> None:
    """Channel j and channel j + C/2 turn by t·θ^(−2j/C)."""
    x = np.zeros((1, 1, 1, 6))
    x[..., 1] = 1.0
    y = rope.forward(rotation_of([5], 6, theta=100.0), x)[0, 0, 0]
    angle = 5 * 100 ** (-2 / 6)
    np.testing.assert_allclose(y, [0, math.cos(angle), 0, 0, math.sin(angle), 0], atol=1e-15)


def test_position_zero_is_not_turned(rng: np.random.Generator) -> None:
    x = rng.standard_normal((1, 1, 2, 8))
    assert (rope.forward(rotation_of([0], 8), x) == x).all()


def test_a_score_depends_on_the_distance_alone(rng: np.random.Generator) -> None:
    q, k = rng.standard_normal((2, 1, 1, 1, 8))

    def score(i: int, j: int) -> float:
        return float((rope.forward(rotation_of([i], 8), q) * rope.forward(rotation_of([j], 8), k)).sum())

    assert math.isclose(score(9, 4), score(105, 100), rel_tol=1e-11)
    assert not math.isclose(score(9, 4), score(9, 5), rel_tol=1e-3)


def test_backward_undoes_forward_and_lengths_stay(rng: np.random.Generator) -> None:
    rotation = rotation_of([3, 1, 400], 6)
    x = rng.standard_normal((2, 3, 2, 6))
    y = rope.forward(rotation, x)
    np.testing.assert_allclose(rope.backward(rotation, y), x, atol=1e-15)
    np.testing.assert_allclose((y * y).sum(-1), (x * x).sum(-1), rtol=1e-14)


def test_far_positions_are_exact_in_float32_too() -> None:
    rotation = rope.init(np.array([100_003]), 8)
    assert rotation.cos.dtype == np.float32
    for j, cos in enumerate(rotation.cos[0, 0]):
        assert abs(float(cos) - math.cos(100_003 * 10_000 ** (-2 * j / 8))) < 1e-7
