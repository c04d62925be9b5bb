"""AdamW, Muon, clipping and the learning rate: against formulas, singular values, and each other."""

import dataclasses
import math

import numpy as np
import pytest

from minimoe.core import tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.layers import decoder
from minimoe.optim import clipping, optimizer, schedule
from minimoe.optim.adamw import direction
from minimoe.optim.muon import POLYNOMIALS, direction, orthogonalize
from minimoe.optim.optimizer import Moments

MODEL = ModelConfig(
    vocab_size=11, width=8, layers=2, heads=2, kv_heads=1, head_width=4, context=4, experts=3, expert_width=12
)
CONSTANT = TrainConfig(warmup=0, final_rate=1.0)  # a learning rate that never changes


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def a_model(rng, dtype=np.float64):
    params = decoder.init(rng, MODEL, dtype)
    return params, tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), params)


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


# AdamW


def test_adam_follows_a_sequence_worked_by_hand():
    """β₁ = ½, β₂ = ¾, gradients 1, 3: means ½, 7/4, unbiased 1, 7/3; squares ¼, 39/16, unbiased 1, 39/7."""
    config = TrainConfig(beta1=0.5, beta2=0.75)
    moments = Moments(np.zeros(1), np.zeros(1))
    assert direction(np.array([1.0]), moments, config, 0) == pytest.approx(1.0)
    assert direction(np.array([3.0]), moments, config, 1) == pytest.approx((7 / 3) / math.sqrt(39 / 7))
    assert moments.mean == pytest.approx(7 / 4)
    assert moments.square == pytest.approx(39 / 16)


def test_first_step_of_adamw_moves_every_entry_by_the_learning_rate(rng):
    params, gradient = a_model(rng)
    before = tree.map(np.copy, params)
    config = dataclasses.replace(CONSTANT, optimizer="adamw", learning_rate=0.01, weight_decay=0.0)
    optimizer.update(params, gradient, optimizer.init(params, config), config, 0)
    for new, old, d in zip(*map(tree.leaves, (params, before, gradient)), strict=True):
        np.testing.assert_allclose(new, old - 0.01 * np.sign(d), atol=1e-6)


def test_adam_of_a_constant_gradient_has_its_sign_at_every_step():
    moments = Moments(np.zeros(3), np.zeros(3))
    gradient = np.array([1e-3, -2.0, 50.0])
    for step in range(20):
        np.testing.assert_allclose(direction(gradient, moments, TrainConfig(), step), [1, -1, 1], atol=1e-4)


def test_adam_does_not_move_what_has_no_gradient():
    moments = Moments(np.zeros(2), np.zeros(2))
    assert not direction(np.zeros(2), moments, TrainConfig(), 0).any()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_decay_shrinks_matrices_only_and_apart_from_the_gradient(rng, kind):
    config = dataclasses.replace(CONSTANT, optimizer=kind, learning_rate=0.1, weight_decay=0.5)
    without = dataclasses.replace(config, weight_decay=0.0)
    params, gradient = a_model(rng)
    start, plain = tree.map(np.copy, params), tree.map(np.copy, params)
    optimizer.update(params, gradient, optimizer.init(params, config), config, 0)
    optimizer.update(plain, gradient, optimizer.init(plain, without), without, 0)
    for new, other, old in zip(*map(tree.leaves, (params, plain, start)), strict=True):
        decayed = 0.1 * 0.5 * old if old.ndim > 1 else 0.0 * old
        np.testing.assert_allclose(new, other - decayed, rtol=0, atol=1e-12)


def test_decay_follows_the_learning_rate(rng):
    params, gradient = a_model(rng)
    config = TrainConfig(learning_rate=0.1, weight_decay=0.5, warmup=10)
    start = tree.map(np.copy, params)
    still = tree.map(np.zeros_like, gradient)
    optimizer.update(params, still, optimizer.init(params, config), config, 4)
    np.testing.assert_allclose(params.embedding.table, start.embedding.table * (1 - 0.05 * 0.5))


# Muon


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
    config = TrainConfig(momentum=0.8, newton_schulz_steps=4)
    mean, remembered = np.zeros(shape), np.zeros(shape)
    for _ in range(3):
        d = rng.standard_normal(shape)
        result = direction(d, mean, config)
        remembered = 0.8 * remembered + 0.2 * d
        ahead = 0.8 * remembered + 0.2 * d
        np.testing.assert_allclose(mean, remembered)
        np.testing.assert_allclose(result, orthogonalize(ahead, 4) * 0.2 * 3, atol=1e-12)


def test_muon_moves_a_matrix_by_two_tenths_of_the_learning_rate_in_root_mean_square(rng):
    d = rng.standard_normal((16, 48))
    direction = direction(d, np.zeros_like(d), TrainConfig(newton_schulz_steps=6))
    assert math.sqrt(np.square(direction).mean()) == pytest.approx(0.2, rel=1e-3)


def test_muon_takes_attention_and_experts_and_leaves_the_rest_to_adamw(rng):
    params, _ = a_model(rng)
    names = [name for name, _ in tree.named_leaves(params)]
    muons = {name for name in names if optimizer.is_muons(name, TrainConfig(optimizer="muon"))}
    attention = {f"attention.{part}.weight" for part in ("query", "key", "value", "output")}
    experts = {f"moe.experts.{part}" for part in ("w_gate", "w_up", "w_down")}
    assert muons == {f"blocks[{layer}].{part}" for layer in range(2) for part in attention | experts}
    assert not any(optimizer.is_muons(name, TrainConfig(optimizer="adamw")) for name in names)
    state = optimizer.init(params, TrainConfig(optimizer="muon"))
    assert {name for name, moments in state.items() if moments.square is None} == muons


def test_one_update_gives_every_parameter_its_own_optimisers_direction(rng):
    params, gradient = a_model(rng)
    config = TrainConfig(learning_rate=0.06, warmup=2, weight_decay=0.0)  # at the first step, half of 0.06
    expected, fresh = tree.map(np.copy, params), optimizer.init(params, config)
    for (name, leaf), d in zip(tree.named_leaves(expected), tree.leaves(gradient), strict=True):
        if fresh[name].square is None:
            leaf -= 0.03 * direction(d, fresh[name].mean, config)
        else:
            leaf -= 0.03 * direction(d, fresh[name], config, 0)
    state = optimizer.init(params, config)
    optimizer.update(params, gradient, state, config, 0)
    for new, wanted in zip(tree.leaves(params), tree.leaves(expected), strict=True):
        np.testing.assert_allclose(new, wanted, atol=1e-12)
    for name, moments in state.items():
        assert moments.mean.any() and (moments.square is None or moments.square.any())
        np.testing.assert_allclose(moments.mean, fresh[name].mean)


def test_update_leaves_the_gradient_alone(rng):
    params, gradient = a_model(rng)
    before = tree.map(np.copy, gradient)
    optimizer.update(params, gradient, optimizer.init(params, TrainConfig()), TrainConfig(), 0)
    for d, old in zip(tree.leaves(gradient), tree.leaves(before), strict=True):
        np.testing.assert_array_equal(d, old)


def test_some_parameters_are_updated_as_they_are_among_all_and_others_not_at_all(rng):
    (params, gradient), (others, _) = (a_model(np.random.default_rng(1), np.float32) for _ in range(2))
    start = tree.map(np.copy, params)
    optimizer.update(params, gradient, optimizer.init(params, TrainConfig()), TrainConfig(), 0)
    some = dict(list(tree.named_leaves(gradient))[::2])
    state = optimizer.init(others, TrainConfig())
    optimizer.update_some(dict(tree.named_leaves(others)), some, state, TrainConfig(), 0)
    for (name, now), whole, before in zip(
        tree.named_leaves(others), tree.leaves(params), tree.leaves(start), strict=True
    ):
        np.testing.assert_array_equal(now, whole if name in some else before)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_stack_is_updated_in_pieces_as_it_is_at_once(name, monkeypatch):
    config = dataclasses.replace(CONSTANT, optimizer=name)
    (params, gradient), (others, _) = (a_model(np.random.default_rng(1)) for _ in range(2))
    optimizer.update(params, gradient, optimizer.init(params, config), config, 0)
    monkeypatch.setattr(optimizer, "PIECE", 1)  # a matrix at a time
    optimizer.update(others, gradient, optimizer.init(others, config), config, 0)
    for ours, theirs in zip(tree.leaves(others), tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=0)


def test_an_expert_without_gradient_only_decays_and_harms_no_other(rng):
    config = dataclasses.replace(CONSTANT, learning_rate=0.1, weight_decay=0.5)
    params, gradient = a_model(rng, np.float32)
    gradient.blocks[0].moe.experts.w_up[1] = 0
    start = params.blocks[0].moe.experts.w_up.copy()
    optimizer.update(params, gradient, optimizer.init(params, config), config, 0)
    new = params.blocks[0].moe.experts.w_up
    np.testing.assert_allclose(new[1], start[1] * 0.95, rtol=1e-6)
    assert np.isfinite(new).all() and (new[[0, 2]] != start[[0, 2]]).all()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_training_a_linear_map_finds_it(rng, kind):
    """min ‖W x − A x‖² by the updates alone, through the parameters of an attention projection."""
    config = TrainConfig(optimizer=kind, learning_rate=0.1, weight_decay=0.0, warmup=0, steps=200, final_rate=0.0)
    params, _ = a_model(rng)
    target = rng.standard_normal((8, 8))
    state = optimizer.init(params, config)
    zero = tree.map(np.zeros_like, params)
    for step in range(200):
        zero.blocks[0].attention.query.weight[...] = params.blocks[0].attention.query.weight - target
        optimizer.update(params, zero, state, config, step)
    assert np.abs(params.blocks[0].attention.query.weight - target).max() < 0.05


# clipping


def test_global_norm_is_that_of_all_entries_together(rng):
    _, gradient = a_model(rng, np.float32)
    everything = np.concatenate([leaf.ravel() for leaf in tree.leaves(gradient)]).astype(np.float64)
    assert math.sqrt(clipping.squared_norm(gradient)) == pytest.approx(frobenius(everything), rel=1e-6)


def test_clipping_scales_to_exactly_the_limit_and_keeps_the_direction(rng):
    _, gradient = a_model(rng)
    before, norm = tree.map(np.copy, gradient), math.sqrt(clipping.squared_norm(gradient))
    assert float(clipping.clip(gradient, norm / 4)) == norm
    for d, old in zip(tree.leaves(gradient), tree.leaves(before), strict=True):
        np.testing.assert_allclose(d, old / 4, rtol=1e-12)


@pytest.mark.parametrize("limit", [0.0, 1e9])
def test_clipping_changes_no_bit_below_the_limit_or_without_one(rng, limit):
    _, gradient = a_model(rng, np.float32)
    before = tree.map(np.copy, gradient)
    clipping.clip(gradient, limit)
    for d, old in zip(tree.leaves(gradient), tree.leaves(before), strict=True):
        np.testing.assert_array_equal(d, old)


def test_a_zero_gradient_is_clipped_to_zero(rng):
    _, gradient = a_model(rng, np.float32)
    zero = tree.zeros_like(gradient)
    assert float(clipping.clip(zero, 1.0)) == 0
    assert not any(leaf.any() for leaf in tree.leaves(zero))


# the learning rate


def test_learning_rate_warms_up_then_falls_in_a_straight_line_to_its_end():
    config = TrainConfig(learning_rate=0.8, warmup=4, steps=12, final_rate=0.25, schedule="linear")
    rates = [schedule.learning_rate(step, config) for step in range(13)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4:] == pytest.approx(np.linspace(0.8, 0.2, 9))
    assert schedule.learning_rate(1000, config) == pytest.approx(0.2)


def test_a_cosine_starts_and_ends_flat_and_is_half_way_at_half_time():
    config = TrainConfig(learning_rate=0.8, warmup=4, steps=12, final_rate=0.25)
    rates = [schedule.learning_rate(step, config) for step in range(4, 13)]
    assert rates[0] == 0.8
    assert rates[4] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.2)
    assert rates[0] - rates[1] == pytest.approx(rates[-2] - rates[-1])
    assert rates[0] - rates[1] < 0.25 * (rates[3] - rates[4])


def test_learning_rate_starts_at_its_peak_without_warm_up():
    assert schedule.learning_rate(0, TrainConfig(learning_rate=0.8, warmup=0)) == 0.8


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_learning_rate_of_a_run_shorter_than_its_warm_up_only_rises(steps):
    config = TrainConfig(learning_rate=1.0, warmup=3, steps=steps)
    assert [schedule.learning_rate(step, config) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])
