"""The training loss: the same value and gradient however a batch is split, auxiliary losses and capacity included."""

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe import objective, tree
from minimoe.config import ModelConfig
from minimoe.layers import balance, decoder
from minimoe.layers.balance import Coefficients
from minimoe.layers.decoder import Decoder
from minimoe.objective import Objective, Shard, loss_and_gradient

EVERY_LOSS = Coefficients(balance=0.5, importance=0.3, load=0.4, z=0.2)
SEQUENCES = 6


def drawn(rng: np.random.Generator, config: ModelConfig) -> Decoder:
    return tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), decoder.init(rng, config, np.float64))


def batch_of(rng: np.random.Generator, config: ModelConfig, masked: bool = True, noisy: bool = True) -> Shard:
    tokens, targets = rng.integers(config.vocab_size, size=(2, SEQUENCES, config.context))
    noise = rng.standard_normal((config.layers, SEQUENCES, config.context, config.experts)) if noisy else None
    lengths = rng.integers(config.context + 1, size=SEQUENCES)
    mask = (np.arange(config.context) < lengths[:, None]).astype(float) if masked else None
    return Shard(tokens, targets, noise, mask)


def split(batch: Shard, sizes: list[int]) -> list[Shard]:
    shards, start = [], 0
    for size in sizes:
        rows = slice(start, start := start + size)
        shards.append(
            Shard(
                batch.tokens[rows],
                batch.targets[rows],
                None if batch.noise is None else batch.noise[:, rows],
                None if batch.mask is None else batch.mask[rows],
            )
        )
    return shards


def assert_same(ours: tuple[Any, Decoder], theirs: tuple[Any, Decoder]) -> None:
    assert ours[0].total == pytest.approx(theirs[0].total, rel=1e-13)
    assert ours[0].dropped == theirs[0].dropped
    for (name, a), b in zip(tree.named_leaves(ours[1]), tree.leaves(theirs[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13, err_msg=name)


@given(
    sizes=st.sampled_from([[3, 3], [2, 2, 2], [1] * 6, [5, 1], [1, 2, 3]]),
    masked=st.booleans(),
    noisy=st.booleans(),
    capacity_factor=st.none() | st.just(0.6),
    recompute=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_split_of_a_batch_gives_its_loss_and_gradient(
    small: ModelConfig,
    sizes: list[int],
    masked: bool,
    noisy: bool,
    capacity_factor: float | None,
    recompute: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    params, batch = drawn(rng, small), batch_of(rng, small, masked, noisy)
    goal = Objective(EVERY_LOSS, capacity_factor)
    whole = loss_and_gradient(params, [batch], small, goal)
    parts = loss_and_gradient(params, split(batch, sizes), small, goal, recompute=recompute)
    assert_same(parts, whole)


def test_averaging_the_losses_of_parts_would_be_another_loss(rng: np.random.Generator, small: ModelConfig) -> None:
    """The fault that sums over tokens rule out: it would show here, so the test above can fail."""
    params, batch = drawn(rng, small), batch_of(rng, small)
    goal = Objective(EVERY_LOSS)
    whole, _ = loss_and_gradient(params, [batch], small, goal)
    parts = [loss_and_gradient(params, [shard], small, goal)[0].total for shard in split(batch, [2, 2, 2])]
    assert abs(np.mean(parts) - whole.total) > 0.01


def test_threads_change_nothing_to_the_bit(rng: np.random.Generator, small: ModelConfig) -> None:
    params, batch = drawn(rng, small), batch_of(rng, small)
    shards = split(batch, [2, 2, 2])
    one_by_one = loss_and_gradient(params, shards, small, Objective(EVERY_LOSS))
    with ThreadPoolExecutor(3) as pool:
        at_once = loss_and_gradient(params, shards, small, Objective(EVERY_LOSS), run=pool.map)
    assert one_by_one[0].total == at_once[0].total
    assert all((a == b).all() for a, b in zip(tree.leaves(one_by_one[1]), tree.leaves(at_once[1]), strict=True))


def test_the_total_is_cross_entropy_and_each_layer_s_losses_by_their_coefficients(
    rng: np.random.Generator, small: ModelConfig
) -> None:
    params, batch = drawn(rng, small), batch_of(rng, small)
    totals, _ = loss_and_gradient(params, [batch], small, Objective(EVERY_LOSS))
    expected = float(totals.cross_entropy)
    for layer in totals.auxiliary:
        expected += sum(c * float(value) for c, value in zip(EVERY_LOSS, layer, strict=True))
    assert len(totals.auxiliary) == small.layers
    assert totals.total == pytest.approx(expected, rel=1e-14)


def test_cross_entropy_is_the_mean_over_the_tokens_that_count(rng: np.random.Generator, small: ModelConfig) -> None:
    params, batch = drawn(rng, small), batch_of(rng, small, noisy=False)
    totals, _ = loss_and_gradient(params, [batch], small, Objective())
    logits, _, _ = decoder.forward(params, batch.tokens, small)
    nats = [
        math.log(np.exp(logits[b, t]).sum()) - logits[b, t, batch.targets[b, t]]
        for b, t in np.argwhere(batch.mask > 0)
    ]
    assert totals.cross_entropy == pytest.approx(np.mean(nats), rel=1e-13)
    assert totals.total == totals.cross_entropy


@pytest.mark.parametrize("name", Coefficients._fields)
def test_a_coefficient_above_zero_changes_the_gradient_of_every_router(
    rng: np.random.Generator, small: ModelConfig, name: str
) -> None:
    params, batch = drawn(rng, small), batch_of(rng, small)
    _, without = loss_and_gradient(params, [batch], small, Objective())
    _, gradient = loss_and_gradient(params, [batch], small, Objective(Coefficients(**{name: 0.01})))
    for layer, plain in zip(gradient.blocks, without.blocks, strict=True):
        assert abs(layer.moe.router.w_gate - plain.moe.router.w_gate).max() > 1e-6


@pytest.mark.parametrize("noisy", [True, False])
def test_padding_behind_a_sequence_changes_nothing(rng: np.random.Generator, small: ModelConfig, noisy: bool) -> None:
    params, batch = drawn(rng, small), batch_of(rng, small, masked=False, noisy=noisy)
    longer = [rng.integers(13, size=(SEQUENCES, 3)) for _ in range(2)]
    noise = None
    if batch.noise is not None:
        noise = np.concatenate([batch.noise, rng.standard_normal((2, SEQUENCES, 3, 5))], axis=2)
    padded = Shard(
        np.concatenate([batch.tokens, longer[0]], axis=1),
        np.concatenate([batch.targets, longer[1]], axis=1),
        noise,
        np.concatenate([np.ones((SEQUENCES, 7)), np.zeros((SEQUENCES, 3))], axis=1),
    )
    goal = Objective(EVERY_LOSS)
    assert_same(loss_and_gradient(params, [padded], small, goal), loss_and_gradient(params, [batch], small, goal))


def test_a_shard_of_padding_alone_counts_for_nothing(rng: np.random.Generator, small: ModelConfig) -> None:
    params, batch = drawn(rng, small), batch_of(rng, small, masked=False)
    assert batch.noise is not None
    full = batch._replace(mask=np.ones((SEQUENCES, 7)))
    padding = Shard(batch.tokens[:2], batch.targets[:2], batch.noise[:, :2], np.zeros((2, 7)))
    goal = Objective(EVERY_LOSS)
    assert_same(loss_and_gradient(params, [full, padding], small, goal), loss_and_gradient(params, [full], small, goal))


def test_a_batch_of_padding_alone_gives_zero_and_no_warning(rng: np.random.Generator, small: ModelConfig) -> None:
    params, batch = drawn(rng, small), batch_of(rng, small)
    nothing = batch._replace(mask=np.zeros((SEQUENCES, 7)))
    totals, gradient = loss_and_gradient(params, [nothing], small, Objective(EVERY_LOSS))
    assert totals.total == 0
    assert not any(leaf.any() for leaf in tree.leaves(gradient))


def test_without_noise_the_load_loss_sends_nothing_back(rng: np.random.Generator, small: ModelConfig) -> None:
    params, batch = drawn(rng, small), batch_of(rng, small, noisy=False)
    _, without = loss_and_gradient(params, [batch], small, Objective())
    totals, gradient = loss_and_gradient(params, [batch], small, Objective(Coefficients(load=1.0)))
    assert all(np.isfinite(layer.load) for layer in totals.auxiliary)
    assert all((a == b).all() for a, b in zip(tree.leaves(gradient), tree.leaves(without), strict=True))


def test_the_losses_are_those_of_the_summed_counts(rng: np.random.Generator, small: ModelConfig) -> None:
    params, batch = drawn(rng, small), batch_of(rng, small)
    goal = Objective(EVERY_LOSS)
    forwards = [objective.forward(params, shard, small, goal, keep=False) for shard in split(batch, [4, 2])]
    totals = objective.add_up(forwards, goal)
    assert all(forward.caches is None for forward in forwards)
    for layer in range(small.layers):
        stats = tree.add(*(forward.stats[layer] for forward in forwards))
        assert totals.auxiliary[layer] == balance.loss(stats, EVERY_LOSS)[0]
        assert stats.tokens == batch.mask.sum()


def test_capacity_belongs_to_the_objective_and_is_reported(rng: np.random.Generator, small: ModelConfig) -> None:
    params, batch = drawn(rng, small), batch_of(rng, small)
    totals, _ = loss_and_gradient(params, [batch], small, Objective(capacity_factor=0.3))
    assert all(dropped > 0 for dropped in totals.dropped)
    config = dataclasses.replace(small, active_experts=small.experts)
    totals, _ = loss_and_gradient(params, [batch], config, Objective(capacity_factor=1.0))
    assert totals.dropped == [0, 0], "with every expert active each has its fair share"
