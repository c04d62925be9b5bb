"""One training step: the noise does not know how the batch is cut, and a loss that is no number changes nothing."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
from small_models import assert_close

from minimoe.core import tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder
from minimoe.losses import objective
from minimoe.losses.balance import Coefficients
from minimoe.losses.objective import Objective, Shard
from minimoe.optim import optimizer
from minimoe.parallel import exchange, launch
from minimoe.parallel.group import Group
from minimoe.training import step

CONFIG = ModelConfig(vocab_size=11, width=8, layers=2, heads=2, head_width=4, context=5, experts=3, expert_width=4)
RECIPE = TrainConfig(batch=6, warmup=0)
TOKENS, TARGETS = np.random.default_rng(0).integers(CONFIG.vocab_size, size=(2, 6, 5))


@pytest.fixture
def params() -> Decoder:
    return decoder.init(np.random.default_rng(1), CONFIG)


@pytest.mark.parametrize("threads", [1, 2, 4, 9])
def test_every_cut_of_a_batch_has_the_same_tokens_and_noise(params: Decoder, threads: int) -> None:
    whole = step.shard_batch(np.random.default_rng(2), params, TOKENS, TARGETS, CONFIG, RECIPE, 1)[0]
    shards = step.shard_batch(np.random.default_rng(2), params, TOKENS, TARGETS, CONFIG, RECIPE, threads)
    assert len(shards) == min(threads, 6)
    np.testing.assert_array_equal(np.concatenate([shard.tokens for shard in shards]), TOKENS)
    np.testing.assert_array_equal(np.concatenate([shard.targets for shard in shards]), TARGETS)
    np.testing.assert_array_equal(np.concatenate([shard.noise for shard in shards], axis=1), whole.noise)


def test_without_noise_none_is_drawn(params: Decoder) -> None:
    def cut(noise: bool) -> Shard:
        batch = Shard(TOKENS, TARGETS)
        return step.cut(np.random.default_rng(2), params, batch, CONFIG, RECIPE, 1, noisy=noise)[0]

    assert cut(True).noise is not None and cut(False).noise is None


def test_a_step_is_downhill(params: Decoder) -> None:
    moments = optimizer.init(params, RECIPE)
    shards = step.shard_batch(np.random.default_rng(2), params, TOKENS, TARGETS, CONFIG, RECIPE, 2)
    losses = [float(step.train_step(params, moments, shards, CONFIG, RECIPE, number)[0].total) for number in range(3)]
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("router", ["noisy_top_k", "sigmoid_bias"])
def test_a_loss_that_is_no_number_changes_nothing(router: str) -> None:
    """Nor what a router learns without a gradient, although the load is known."""
    config = dataclasses.replace(CONFIG, router=router)
    params = decoder.init(np.random.default_rng(1), config)
    params.norm.gain[0] = np.nan
    before = tree.map(np.copy, params)
    moments = optimizer.init(params, RECIPE)
    shards = step.shard_batch(np.random.default_rng(2), params, TOKENS, TARGETS, config, RECIPE, 2)
    totals, norm = step.train_step(params, moments, shards, config, RECIPE, 0)
    assert not step.is_finite(totals, norm)
    for one, other in zip(tree.leaves(before), tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not any(moment.mean.any() for moment in moments.values())


def test_the_recipe_reaches_the_objective_each_setting_in_its_place(params: Decoder) -> None:
    recipe = dataclasses.replace(
        RECIPE,
        balance_loss=0.1,
        importance_loss=0.2,
        load_loss=0.3,
        z_loss=0.4,
        sequence_loss=0.7,
        capacity_factor=0.6,
        pooled_balance=True,
    )
    shards = step.shard_batch(np.random.default_rng(2), params, TOKENS, TARGETS, CONFIG, recipe, 2)
    goal = Objective(Coefficients(balance=0.1, importance=0.2, load=0.3, z=0.4, sequence=0.7), 0.6, pooled_balance=True)
    expected, _ = objective.loss_and_gradient(params, shards, CONFIG, goal)
    totals, _ = step.gradient(params, shards, CONFIG, recipe)
    assert float(totals.total) == float(expected.total)
    assert totals.dropped == expected.dropped
    assert min(totals.dropped) > 0


@pytest.mark.parametrize("limit", [1e-3, 0.0])
def test_a_gradient_is_clipped_before_the_optimizer_remembers_it(params: Decoder, limit: float) -> None:
    """After one step AdamW's mean is (1 − β₁) times the gradient; the step itself hardly depends on its length."""
    recipe = dataclasses.replace(RECIPE, optimizer="adamw", clip=limit)
    moments = optimizer.init(params, recipe)
    shards = step.shard_batch(np.random.default_rng(2), params, TOKENS, TARGETS, CONFIG, recipe, 2)
    _, norm = step.train_step(params, moments, shards, CONFIG, recipe, 0)
    remembered = np.sqrt(sum(np.square(moment.mean).sum(dtype=np.float64) for moment in moments.values()))
    assert norm > 1e-2, "the norm is reported as it was"
    assert remembered == pytest.approx((1 - recipe.beta1) * (limit or norm), rel=1e-4)


@pytest.mark.parametrize("owners", [False, True])
@pytest.mark.parametrize("workers", [2, 3])
def test_several_workers_take_the_step_of_one(monkeypatch: pytest.MonkeyPatch, workers: int, owners: bool) -> None:
    """The limit is so low that every gradient is clipped; with ``owners``, each worker has experts of its own."""
    monkeypatch.setattr(exchange, "exchange_is_faster", lambda *_: owners)
    monkeypatch.setattr(launch, "can_fork", lambda: False)  # threads
    recipe = dataclasses.replace(RECIPE, dtype="float64", clip=1e-3, capacity_factor=0.8)
    start = decoder.init(np.random.default_rng(1), CONFIG, "float64")

    def stepped(count: int) -> tuple[Decoder, optimizer.State]:
        params, rng = tree.map(np.copy, start), np.random.default_rng(2)
        with step.open_workers(params, optimizer.init(params, recipe), CONFIG, recipe, count) as opened:
            for number in range(2):
                opened.step(step.shard_batch(rng, opened.params, TOKENS, TARGETS, CONFIG, recipe, count), number)
        return opened.params, opened.moments

    assert exchange.worth_exchanging(CONFIG, recipe, workers) == owners
    together, alone = stepped(workers), stepped(1)
    assert_close(together, alone, atol=1e-10)
    assert all((leaf != before).any() for leaf, before in zip(tree.leaves(alone[0]), tree.leaves(start), strict=True))


@pytest.mark.parametrize("number", [0, 1, 40])
def test_the_optimizer_is_told_which_step_it_takes(params: Decoder, number: int) -> None:
    recipe = dataclasses.replace(RECIPE, optimizer="adamw", warmup=10, clip=0.0)
    expected = tree.map(np.copy, params)
    shards = step.shard_batch(np.random.default_rng(2), params, TOKENS, TARGETS, CONFIG, recipe, 2)
    _, gradient = step.gradient(params, shards, CONFIG, recipe)
    optimizer.update_some(dict(tree.named_leaves(expected)), gradient, optimizer.init(expected, recipe), recipe, number)
    step.train_step(params, optimizer.init(params, recipe), shards, CONFIG, recipe, number)
    for one, other in zip(tree.leaves(expected), tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("total", "norm", "finite"), [(1.0, 2.0, True), (np.inf, 2.0, False), (1.0, np.inf, False), (np.nan, 2.0, False)]
)
def test_both_the_loss_and_the_norm_have_to_be_finite(params: Decoder, total: float, norm: float, finite: bool) -> None:
    shards = step.shard_batch(np.random.default_rng(2), params, TOKENS, TARGETS, CONFIG, RECIPE, 1)
    totals, _ = step.gradient(params, shards, CONFIG, RECIPE)
    assert step.is_finite(totals._replace(total=total), norm) is finite


def test_the_state_of_a_router_moves_once_in_a_step_however_many_shards_there_are() -> None:
    config = dataclasses.replace(CONFIG, router="sigmoid_bias")
    params = decoder.init(np.random.default_rng(1), config)
    shards = step.shard_batch(np.random.default_rng(2), params, TOKENS, TARGETS, config, RECIPE, 3)
    totals, _ = step.train_step(params, optimizer.init(params, RECIPE), shards, config, RECIPE, 0)
    for block, stats in zip(params.blocks, totals.stats, strict=True):
        moved = RECIPE.bias_rate * np.sign(stats.assignments.mean() - stats.assignments)
        np.testing.assert_allclose(block.moe.router.bias, moved, rtol=1e-6)
    assert any(block.moe.router.bias.any() for block in params.blocks)


@pytest.mark.parametrize(
    ("router", "given", "used"),
    [("noisy_top_k", None, 0.01), ("sigmoid_bias", None, 0.0), ("sigmoid_bias", 0.3, 0.3), ("noisy_top_k", 0.0, 0.0)],
)
def test_a_recipe_without_a_coefficient_of_the_balance_loss_takes_the_router_s(
    router: str, given: float | None, used: float
) -> None:
    config, recipe = dataclasses.replace(CONFIG, router=router), dataclasses.replace(RECIPE, balance_loss=given)
    assert step.objective_of(config, recipe).coefficients.balance == used


def test_only_the_first_worker_moves_the_state_which_all_of_them_share() -> None:
    class Second(Group):
        rank = 1

        def share(self, params: Mapping[str, np.ndarray]) -> list[str]:
            return list(params)

    config = dataclasses.replace(CONFIG, router="sigmoid_bias")
    params = decoder.init(np.random.default_rng(1), config)
    shards = step.shard_batch(np.random.default_rng(2), params, TOKENS, TARGETS, config, RECIPE, 1)
    step.train_step(params, optimizer.init(params, RECIPE), shards, config, RECIPE, 0, Second())
    assert not any(block.moe.router.bias.any() for block in params.blocks)


@pytest.mark.parametrize("together", [1, 2, 3])
def test_sequences_that_belong_together_stay_in_one_shard(rng: np.random.Generator, together: int) -> None:
    params = decoder.init(rng, CONFIG)
    rows = np.arange(6)
    column = np.repeat(rows[:, None], 3, 1)
    extra = {"of": 10.0 * rows}
    batch = Shard(
        column % CONFIG.vocab_size,
        column % CONFIG.vocab_size,
        mask=column,
        loss_mask=-column,
        starts=2 * column,
        extra=extra,
    )
    for workers in (1, 2, 4, 9):
        shards = step.cut(np.random.default_rng(0), params, batch, CONFIG, RECIPE, workers, together)
        assert len(shards) == min(workers, 6 // together)
        for shard in shards:
            first = shard.mask[0, 0]
            assert first % together == 0 and len(shard.tokens) % together == 0
            np.testing.assert_array_equal(shard.loss_mask, -shard.mask)
            np.testing.assert_array_equal(shard.starts, 2 * shard.mask)
            np.testing.assert_array_equal(shard.extra["of"], 10.0 * shard.mask[:, 0])
        np.testing.assert_array_equal(np.concatenate([shard.mask[:, 0] for shard in shards]), rows)


def test_frozen_gradients_are_no_part_of_the_norm_and_nothing_frozen_moves(rng: np.random.Generator) -> None:
    config = dataclasses.replace(CONFIG, router="sigmoid_bias")
    params = decoder.init(rng, config)
    shards = step.shard_batch(np.random.default_rng(2), params, TOKENS, TARGETS, config, RECIPE, 1)
    _, whole = step.gradient(params, shards, config, RECIPE)
    frozen = {"head.weight", "blocks[0].moe.router.bias", "blocks[0].moe.experts.w_up"}
    start = tree.map(np.copy, params)
    moments = optimizer.init(params, RECIPE, frozen)
    _, norm = step.train_step(params, moments, shards, config, RECIPE, 0, frozen=frozen)
    expected = np.sqrt(sum((whole[name].astype(float) ** 2).sum() for name in whole.keys() - frozen))
    np.testing.assert_allclose(norm, expected, rtol=1e-5)
    for (name, now), before in zip(tree.named_leaves(params), tree.leaves(start), strict=True):
        assert (now == before).all() == (name in frozen), name


def test_every_shard_has_the_whole_dropout_of_the_adapters(params: Decoder) -> None:
    masks = [np.ones(8), np.zeros((3, 8))]
    batch = Shard(TOKENS, TARGETS, dropout=masks)
    for shard in step.cut(np.random.default_rng(2), params, batch, CONFIG, RECIPE, 4):
        assert shard.dropout is not None
        assert all(mine is mask for mine, mask in zip(shard.dropout, masks, strict=True))
