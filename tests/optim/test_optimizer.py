"""The optimiser's step: which of the two takes a parameter, what decays, and what is left alone."""

import dataclasses

import numpy as np
import pytest

from minimoe.core import tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError
from minimoe.layers import decoder
from minimoe.optim import adamw, muon, optimizer

CONFIG = ModelConfig(
    vocab_size=11, width=8, layers=2, heads=2, kv_heads=1, head_width=4, context=4, experts=3, expert_width=12
)
CONSTANT = TrainConfig(warmup=0, final_rate=1.0)  # a learning rate that never changes


def a_model(rng, dtype=np.float64):
    params = decoder.init(rng, CONFIG, dtype)
    return params, tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), params)


def test_first_step_of_adamw_moves_every_entry_by_the_learning_rate(rng):
    params, gradient = a_model(rng)
    before = tree.map(np.copy, params)
    recipe = dataclasses.replace(CONSTANT, optimizer="adamw", learning_rate=0.01, weight_decay=0.0)
    optimizer.update(params, gradient, optimizer.init(params, recipe), recipe, 0)
    for new, old, d in zip(*map(tree.leaves, (params, before, gradient)), strict=True):
        np.testing.assert_allclose(new, old - 0.01 * np.sign(d), atol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_decay_shrinks_matrices_only_and_apart_from_the_gradient(rng, kind):
    recipe = dataclasses.replace(CONSTANT, optimizer=kind, learning_rate=0.1, weight_decay=0.5)
    without = dataclasses.replace(recipe, weight_decay=0.0)
    params, gradient = a_model(rng)
    start, plain = tree.map(np.copy, params), tree.map(np.copy, params)
    optimizer.update(params, gradient, optimizer.init(params, recipe), recipe, 0)
    optimizer.update(plain, gradient, optimizer.init(plain, without), without, 0)
    for new, other, old in zip(*map(tree.leaves, (params, plain, start)), strict=True):
        decayed = 0.1 * 0.5 * old if old.ndim > 1 else 0.0 * old
        np.testing.assert_allclose(new, other - decayed, rtol=0, atol=1e-12)


def test_decay_follows_the_learning_rate(rng):
    params, gradient = a_model(rng)
    recipe = TrainConfig(learning_rate=0.1, weight_decay=0.5, warmup=10)
    start = tree.map(np.copy, params)
    still = tree.map(np.zeros_like, gradient)
    optimizer.update(params, still, optimizer.init(params, recipe), recipe, 4)
    np.testing.assert_allclose(params.embedding.table, start.embedding.table * (1 - 0.05 * 0.5))


def test_muon_takes_attention_and_experts_and_leaves_the_rest_to_adamw(rng):
    params, _ = a_model(rng)
    attention = {f"attention.{part}.weight" for part in ("query", "key", "value", "output")}
    experts = {f"moe.experts.{part}" for part in ("w_gate", "w_up", "w_down")}
    expected = {f"blocks[{layer}].{part}" for layer in range(2) for part in attention | experts}
    for kind, by_muon in (("muon", expected), ("adamw", set())):
        state = optimizer.init(params, TrainConfig(optimizer=kind))
        assert list(state) == [name for name, _ in tree.named_leaves(params)]
        assert {name for name, moments in state.items() if moments.square is None} == by_muon


def test_one_update_gives_every_parameter_its_own_optimisers_direction(rng):
    params, gradient = a_model(rng)
    recipe = TrainConfig(learning_rate=0.06, warmup=2, weight_decay=0.0)  # at the first step, half of 0.06
    expected, fresh = tree.map(np.copy, params), optimizer.init(params, recipe)
    for (name, leaf), d in zip(tree.named_leaves(expected), tree.leaves(gradient), strict=True):
        if fresh[name].square is None:
            leaf -= 0.03 * muon.direction(d, fresh[name].mean, recipe)
        else:
            leaf -= 0.03 * adamw.direction(d, *fresh[name], recipe, 0)
    state = optimizer.init(params, recipe)
    optimizer.update(params, gradient, state, recipe, 0)
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
    recipe = dataclasses.replace(CONSTANT, optimizer=name)
    (params, gradient), (others, _) = (a_model(np.random.default_rng(1)) for _ in range(2))
    optimizer.update(params, gradient, optimizer.init(params, recipe), recipe, 0)
    monkeypatch.setattr(optimizer, "PIECE", 1)  # a matrix at a time
    optimizer.update(others, gradient, optimizer.init(others, recipe), recipe, 0)
    for ours, theirs in zip(tree.leaves(others), tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=0)


def test_an_expert_without_gradient_only_decays_and_harms_no_other(rng):
    recipe = dataclasses.replace(CONSTANT, learning_rate=0.1, weight_decay=0.5)
    params, gradient = a_model(rng, np.float32)
    gradient.blocks[0].moe.experts.w_up[1] = 0
    start = params.blocks[0].moe.experts.w_up.copy()
    optimizer.update(params, gradient, optimizer.init(params, recipe), recipe, 0)
    new = params.blocks[0].moe.experts.w_up
    np.testing.assert_allclose(new[1], start[1] * 0.95, rtol=1e-6)
    assert np.isfinite(new).all() and (new[[0, 2]] != start[[0, 2]]).all()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_training_a_linear_map_finds_it(rng, kind):
    """min ‖W x − A x‖² by the updates alone, through the parameters of an attention projection."""
    recipe = TrainConfig(optimizer=kind, learning_rate=0.1, weight_decay=0.0, warmup=0, steps=200, final_rate=0.0)
    params, _ = a_model(rng)
    target = rng.standard_normal((8, 8))
    state = optimizer.init(params, recipe)
    zero = tree.map(np.zeros_like, params)
    for step in range(200):
        zero.blocks[0].attention.query.weight[...] = params.blocks[0].attention.query.weight - target
        optimizer.update(params, zero, state, recipe, step)
    assert np.abs(params.blocks[0].attention.query.weight - target).max() < 0.05


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_is_learned_without_a_gradient_has_no_moments_and_does_not_decay(rng, kind):
    config = dataclasses.replace(CONFIG, router="sigmoid_bias")
    recipe = dataclasses.replace(CONSTANT, optimizer=kind, learning_rate=0.1, weight_decay=0.5)
    params = decoder.init(rng, config, np.float64)
    for block in params.blocks:
        block.moe.router.bias[:] = [1, -2, 3]
    state = optimizer.init(params, recipe)
    learned = {name for name, _ in tree.named_leaves(params) if not name.endswith("router.bias")}
    assert state.keys() == learned
    optimizer.update(params, tree.map(np.ones_like, params), state, recipe, 0)
    for block in params.blocks:
        np.testing.assert_array_equal(block.moe.router.bias, [1, -2, 3])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_frozen_leaves_get_no_moment_no_update_and_no_decay(rng, kind):
    recipe = dataclasses.replace(CONSTANT, optimizer=kind, learning_rate=0.1, weight_decay=0.5)
    params, gradient = a_model(rng)
    frozen = {"head.weight", "blocks[1].moe.router.w_gate", "blocks[0].moe.experts.w_up", "norm.gain"}
    start, others = tree.map(np.copy, params), tree.map(np.copy, params)
    state = optimizer.init(params, recipe, frozen)
    assert state.keys() == optimizer.init(params, recipe).keys() - frozen
    optimizer.update(params, gradient, state, recipe, 0)
    optimizer.update(others, gradient, optimizer.init(others, recipe), recipe, 0)
    for (name, now), before, free in zip(
        tree.named_leaves(params), tree.leaves(start), tree.leaves(others), strict=True
    ):
        np.testing.assert_array_equal(now, before if name in frozen else free, err_msg=name)


def test_a_frozen_gradient_has_no_share_in_the_norm(rng):
    params, gradient = a_model(rng)
    named = dict(tree.named_leaves(gradient))
    left = optimizer.trainable(named, {"head.weight"})
    assert list(left) == [name for name in named if name != "head.weight"]
    assert all(left[name] is named[name] for name in left)


def test_a_name_that_is_no_parameter_cannot_be_frozen(rng):
    params, _ = a_model(rng)
    with pytest.raises(UserError, match=r"no parameter 'head.weigth' to freeze \(did you mean 'head.weight'\?\)"):
        optimizer.init(params, TrainConfig(), ["norm.gain", "head.weigth"])
