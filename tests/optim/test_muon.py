"""Muon: against singular value decompositions, and its polynomials against the best there are."""

import math

import numpy as np
import pytest

from minimoe.core.config import TrainConfig
from minimoe.optim import adamw, muon
from minimoe.optim.muon import POLYNOMIALS, orthogonalize


def with_singular_values(rng, values, rows, columns):
    left = np.linalg.qr(rng.standard_normal((rows, rows)))[0]
    right = np.linalg.qr(rng.standard_normal((columns, columns)))[0]
    k = len(values)
    return left[:, :k] * values @ right[:k]


def polar(m):
    """U Vᵀ of m = U S Vᵀ."""
    left, _, right = np.linalg.svd(m, full_matrices=False)
    return left @ right


def frobenius(m):
    return float(np.linalg.norm(m))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32), (1, 5), (7, 1), (3, 24, 40), (2, 3, 40, 24)])
def test_orthogonalised_matrices_keep_their_shape_and_have_singular_values_near_one(rng, shape):
    values = np.linspace(0.2, 1.0, min(shape[-2:]))
    stack = [with_singular_values(rng, values, *shape[-2:]) for _ in range(math.prod(shape[:-2]))]
    m = np.reshape(stack, shape).astype(np.float32)
    result = orthogonalize(m, 5)
    assert result.shape == m.shape and result.dtype == np.float32
    np.testing.assert_allclose(np.linalg.svd(result, compute_uv=False), 1.0, atol=2e-3)
    np.testing.assert_allclose(result, polar(m.astype(float)), atol=2e-3)


@pytest.mark.parametrize(("steps", "tolerance"), [(3, 0.50), (4, 0.09), (5, 0.002), (6, 3e-8)])
def test_steps_bring_a_wide_range_of_singular_values_as_close_to_one_as_promised(rng, steps, tolerance):
    values = np.geomspace(0.01, 1.0, 24)  # 0.0055 of the norm for the smallest
    result = orthogonalize(with_singular_values(rng, values, 24, 60), steps)
    found = np.linalg.svd(result, compute_uv=False)
    assert np.abs(found - 1).max() <= tolerance
    assert np.abs(found - 1).max() > tolerance / 20, "more exact than promised: the promise should be tighter"


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_orthogonalising_keeps_the_singular_vectors_and_bends_the_values_by_the_polynomials(rng, steps):
    values = np.geomspace(1e-3, 1.0, 10)
    m = with_singular_values(rng, values, 10, 16)
    left, s, right = np.linalg.svd(m, full_matrices=False)
    s /= frobenius(m)
    for a, b, c in POLYNOMIALS[:steps]:
        s = a * s + b * s**3 + c * s**5
    np.testing.assert_allclose(orthogonalize(m, steps), left * s @ right, atol=1e-9)


def test_three_steps_point_where_the_exact_polar_factor_points(rng):
    m = rng.standard_normal((48, 64))
    exact, result = polar(m), orthogonalize(m, 3)
    cosine = (exact * result).sum() / frobenius(exact) / frobenius(result)
    assert 0.92 < cosine <= 1


def test_orthogonalising_does_not_see_the_scale(rng):
    m = rng.standard_normal((2, 12, 20)).astype(np.float32)
    expected = orthogonalize(m)
    for scale in (2.0**-40, 2.0**40):
        np.testing.assert_allclose(orthogonalize(m * np.float32(scale)), expected, rtol=1e-5, atol=1e-6)


def test_matrices_of_a_stack_do_not_see_each_other(rng):
    stack = rng.standard_normal((3, 6, 9))
    stack[1] *= 1000
    np.testing.assert_array_equal(orthogonalize(stack), [orthogonalize(m) for m in stack])


def test_a_transposed_matrix_gives_the_transposed_result(rng):
    m = rng.standard_normal((12, 20))
    np.testing.assert_allclose(orthogonalize(m.T), orthogonalize(m).T, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 5, 8])
def test_directions_without_gradient_stay_without_and_zero_stays_zero(rng, steps):
    rank_two = with_singular_values(rng, np.array([1.0, 0.5]), 10, 14).astype(np.float32)
    found = np.linalg.svd(orthogonalize(rank_two, steps), compute_uv=False)
    assert (found[:2] > 0.15).all()
    assert (found[2:] < 1e-3).all()
    assert not orthogonalize(np.zeros((2, 5, 7), np.float32), steps).any()


@pytest.mark.parametrize("scale", [1e-18, 1e-22, 1e-24, 1e-30, 1e-38])
def test_an_average_that_fades_for_want_of_gradients_never_explodes(rng, scale):
    """An expert that gets no tokens keeps 0.9ⁿ of its average, whose squares are soon too small for float32."""
    m = (scale * rng.standard_normal((12, 20))).astype(np.float32)
    assert np.linalg.svd(orthogonalize(m), compute_uv=False).max() < 1.5


def best_polynomial(low, high):
    """Remez: the a s + b s³ + c s⁵ whose largest distance from 1 on [low, high] is smallest, and that distance.

    The best one swings around 1: below at low, above at its maximum, below at its minimum, above at high.
    """
    turns = [low + (high - low) / 3, low + (high - low) * 0.75]
    for _ in range(50):
        points = np.array([low, *turns, high])
        system = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        turns = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a]).real))
    return np.array([a, b, c]), error


def test_polynomials_are_the_best_for_the_intervals_that_reach_them():
    low, high = 0.005, 1.0
    for k in range(4):
        best, error = best_polynomial(low, high)
        np.testing.assert_allclose(POLYNOMIALS[k], best, atol=1e-4)
        low, high = 1 - error, 1 + error
    a, b, c = POLYNOMIALS[4]  # where the interval is a point, Taylor's: value 1, slope 0, curvature 0
    assert (a + b + c, a + 3 * b + 5 * c, 6 * b + 20 * c) == (1, 0, 0)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 6, 9)])
def test_muon_averages_looks_ahead_orthogonalises_and_scales(rng, shape):
    recipe = TrainConfig(momentum=0.8, newton_schulz_steps=4)
    mean, remembered = np.zeros(shape), np.zeros(shape)
    for _ in range(3):
        d = rng.standard_normal(shape)
        result = muon.direction(d, mean, recipe)
        remembered = 0.8 * remembered + 0.2 * d
        ahead = 0.8 * remembered + 0.2 * d
        np.testing.assert_allclose(mean, remembered)
        np.testing.assert_allclose(result, orthogonalize(ahead, 4) * 0.2 * 3, atol=1e-12)


def test_on_noise_muon_s_direction_is_about_as_large_as_that_of_adamw(rng):
    recipe, shape = TrainConfig(), (32, 64)
    moments = np.zeros((3, *shape))
    for step in range(200):
        d = rng.standard_normal(shape)
        of_muon = muon.direction(d, moments[0], recipe)
        of_adamw = adamw.direction(d, moments[1], moments[2], recipe, step)
    of_muon, of_adamw = (math.sqrt(np.square(direction).mean()) for direction in (of_muon, of_adamw))
    assert 0.15 < of_muon < 0.25
    assert 0.5 < of_muon / of_adamw < 2


def test_muon_moves_a_matrix_by_two_tenths_of_the_learning_rate_in_root_mean_square(rng):
    d = rng.standard_normal((16, 48))
    direction = muon.direction(d, np.zeros_like(d), TrainConfig(newton_schulz_steps=6))
    assert math.sqrt(np.square(direction).mean()) == pytest.approx(0.2, rel=1e-3)
