"""The training loss: its parts, what counts in it and what does not. Splitting a batch: test_equivalences."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from small_models import EVERY_LOSS, SEQUENCES, assert_same, batch_of, drawn, split

from minimoe.core import tree
from minimoe.core.arrays import Array
from minimoe.core.config import ModelConfig
from minimoe.layers import decoder, lora
from minimoe.losses import balance, objective
from minimoe.losses.balance import Coefficients
from minimoe.losses.cross_entropy import LossSum
from minimoe.losses.objective import Objective, Shard, loss_and_gradient
from minimoe.losses.token_loss import CrossEntropy, Labelled


def test_the_total_is_cross_entropy_and_each_layer_s_losses_by_their_coefficients(
    rng: np.random.Generator, small: ModelConfig
) -> None:
    params, batch = drawn(rng, small), batch_of(rng, small)
    totals, _ = loss_and_gradient(params, [batch], small, Objective(EVERY_LOSS))
    expected = float(totals.loss)
    for layer in totals.auxiliary:
        expected += sum(c * float(value) for c, value in zip(EVERY_LOSS, layer, strict=True))
    assert len(totals.auxiliary) == small.layers
    assert totals.total == pytest.approx(expected, rel=1e-14)


def test_cross_entropy_is_the_mean_over_the_tokens_that_count(rng: np.random.Generator, small: ModelConfig) -> None:
    params, batch = drawn(rng, small), batch_of(rng, small, noisy=False)
    totals, _ = loss_and_gradient(params, [batch], small, Objective())
    logits, _, _ = decoder.forward(params, batch.tokens, small)
    nats = [
        math.log(np.exp(logits[b, t]).sum()) - logits[b, t, batch.targets[b, t]] for b, t in np.argwhere(batch.mask > 0)
    ]
    assert totals.loss == pytest.approx(np.mean(nats), rel=1e-13)
    assert totals.total == totals.loss


@pytest.mark.parametrize("name", Coefficients._fields)
def test_a_coefficient_above_zero_changes_the_gradient_of_every_router(
    rng: np.random.Generator, small: ModelConfig, name: str
) -> None:
    params, batch = drawn(rng, small), batch_of(rng, small)
    _, without = loss_and_gradient(params, [batch], small, Objective())
    _, gradient = loss_and_gradient(params, [batch], small, Objective(Coefficients(**{name: 0.01})))
    for layer, plain in zip(gradient.blocks, without.blocks, strict=True):
        assert abs(layer.moe.router.w_gate - plain.moe.router.w_gate).max() > 1e-6


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sizes", [[4, 2], [1, 2, 3]])
def test_shards_give_the_losses_and_the_gradient_of_their_batch(
    rng: np.random.Generator, small: ModelConfig, sizes: list[int], recompute: bool
) -> None:
    params, batch = drawn(rng, small), batch_of(rng, small)
    goal = Objective(EVERY_LOSS, capacity_factor=0.7)
    whole = loss_and_gradient(params, [batch], small, goal)
    assert_same(loss_and_gradient(params, split(batch, sizes), small, goal, recompute=recompute), whole)


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
    totals = objective.add_up(params, forwards, small, goal)
    assert all(forward.caches is None for forward in forwards)
    for layer in range(small.layers):
        stats = tree.add(*(forward.sums.stats[layer] for forward in forwards))
        assert totals.auxiliary[layer] == balance.loss(stats, EVERY_LOSS)[0]
        assert stats.tokens == batch.mask.sum()


def test_the_balance_loss_can_be_pooled_as_transformers_does(rng: np.random.Generator, small: ModelConfig) -> None:
    params, batch = drawn(rng, small), batch_of(rng, small, noisy=False)
    goal = Objective(EVERY_LOSS, pooled_balance=True)
    totals, gradient = loss_and_gradient(params, [batch], small, goal)
    others, _ = loss_and_gradient(params, [batch], small, Objective(EVERY_LOSS._replace(balance=0.0)))
    value, _ = balance.pooled(totals.stats, 1.0)
    assert totals.total == pytest.approx(others.total + EVERY_LOSS.balance * value, rel=1e-13)

    direction = [rng.standard_normal(block.moe.router.w_gate.shape) for block in params.blocks]

    def total(step: float) -> float:
        moved = tree.map(np.copy, params)
        for block, way in zip(moved.blocks, direction, strict=True):
            block.moe.router.w_gate[...] += step * way
        return float(loss_and_gradient(moved, [batch], small, goal)[0].total)

    slope = sum((g.moe.router.w_gate * way).sum() for g, way in zip(gradient.blocks, direction, strict=True))
    assert (total(1e-6) - total(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-6)


def test_capacity_belongs_to_the_objective_and_is_reported(rng: np.random.Generator, small: ModelConfig) -> None:
    params, batch = drawn(rng, small), batch_of(rng, small)
    totals, _ = loss_and_gradient(params, [batch], small, Objective(capacity_factor=0.3))
    assert all(dropped > 0 for dropped in totals.dropped)
    config = dataclasses.replace(small, active_experts=small.experts)
    totals, _ = loss_and_gradient(params, [batch], config, Objective(capacity_factor=1.0))
    assert totals.dropped == [0, 0], "with every expert active each has its fair share"


def test_routers_know_that_this_is_training() -> None:
    """In training alone, Switch refuses what is more than a quarter above an expert's fair share."""
    config = ModelConfig(
        vocab_size=7, width=4, layers=1, heads=1, kv_heads=1, head_width=4, context=8, experts=4, active_experts=1,
        expert_width=4, router="switch", noisy_gating=False,
    )  # fmt: skip
    params = decoder.init(np.random.default_rng(0), config)
    params.blocks[0].moe.router.w_gate[...] = 0  # a tie in every token: all choose expert 0
    tokens = np.arange(8)[None] % 7
    done = objective.forward(params, Shard(tokens, tokens), config, Objective())
    assert done.sums.dropped == [8 - 3]


@pytest.mark.parametrize("pooled", [False, True])
def test_experts_that_cost_less_weigh_less_in_the_balance_loss(
    rng: np.random.Generator, small: ModelConfig, pooled: bool
) -> None:
    """Of each layer, and of all layers together."""
    config = dataclasses.replace(small, expert_kind="zero_computation", cheap_balance=0.25)
    params, batch = drawn(rng, config), batch_of(rng, config)
    goal = Objective(Coefficients(balance=0.5), pooled_balance=pooled)
    totals, _ = loss_and_gradient(params, [batch], config, goal)
    weights = np.array([1.0] * (config.experts - 2) + [0.25] * 2)
    added = 0.0
    for layer in [tree.add(*totals.stats)] if pooled else totals.stats:
        share = layer.assignments / (layer.tokens if pooled else layer.assignments.sum())
        added += 0.5 * config.experts * (weights * share * layer.probability).sum() / layer.tokens
    assert float(totals.total - totals.loss) == pytest.approx(added, rel=1e-12)
    assert not np.allclose(added, float(loss_and_gradient(
        params, [batch], dataclasses.replace(config, cheap_balance=1.0), goal
    )[0].total - totals.loss))  # fmt: skip


def test_a_router_s_own_loss_is_that_of_its_own_layer(rng: np.random.Generator, small: ModelConfig) -> None:
    config = dataclasses.replace(small, router="remoe")
    params, batch = drawn(rng, config), batch_of(rng, config)
    for layer, block in enumerate(params.blocks):
        block.moe.router.penalty[:] = 1.0 + layer
    totals, _ = loss_and_gradient(params, [batch], config, Objective())
    own = 0.0
    for layer, sums in enumerate(totals.stats):
        f = config.experts * sums.assignments / (config.active_experts * sums.tokens)
        own += (1.0 + layer) * (f * sums.probability).sum() / sums.tokens
    assert float(totals.total - totals.loss) == pytest.approx(own, rel=1e-12)
    # ... and what it adds to the gradient with respect to the sums is the price λ f / N
    for layer, (sums, dsums) in enumerate(zip(totals.stats, totals.dstats, strict=True)):
        f = config.experts * sums.assignments / (config.active_experts * sums.tokens)
        np.testing.assert_allclose(dsums.probability + dsums.importance, (1.0 + layer) * f / sums.tokens, rtol=1e-12)


def test_packed_documents_give_the_loss_of_each_alone(rng: np.random.Generator, small: ModelConfig) -> None:
    params, batch = drawn(rng, small), batch_of(rng, small, masked=False)
    tokens, targets = np.asarray(batch.tokens[:1]), np.asarray(batch.targets[:1])
    starts = np.array([[0, 0, 2, 2, 2, 2, 6]])
    alone = [Shard(tokens[:, place], targets[:, place]) for place in (slice(0, 2), slice(2, 6), slice(6, 7))]
    goal = Objective(EVERY_LOSS._replace(sequence=0.0))  # which is counted by sequence, whatever is in it
    packed = loss_and_gradient(params, [Shard(tokens, targets, starts=starts)], small, goal)
    assert_same(packed, loss_and_gradient(params, alone, small, goal))


@pytest.mark.parametrize("recompute", [False, True])
def test_the_dropout_of_a_shard_acts_forward_and_backward(
    rng: np.random.Generator, small: ModelConfig, recompute: bool
) -> None:
    def adapt(leaf: np.ndarray) -> lora.Adapted:
        return lora.init(rng, leaf, 2, 0.5)._replace(b=rng.standard_normal((*leaf.shape[:-2], 2, leaf.shape[-1])))

    params = drawn(rng, small)
    first = params.blocks[0]
    experts = type(first.moe.experts)(*(adapt(stack) for stack in first.moe.experts))
    params.blocks[0] = first._replace(moe=first.moe._replace(experts=experts))
    masks = [(rng.random(weight.a.shape[:-1]) < 0.5) / 0.5 for weight in experts]
    shards = split(batch_of(rng, small), [2, 4])
    dropping = [shard._replace(dropout=masks) for shard in shards]
    ours = loss_and_gradient(params, dropping, small, Objective(), recompute=recompute)
    theirs = loss_and_gradient(lora.with_dropout(params, masks), shards, small, Objective())
    assert_same(ours, theirs)
    assert abs(ours[0].total - loss_and_gradient(params, shards, small, Objective())[0].total) > 1e-6


def test_a_loss_mask_weighs_targets_and_hides_no_token_from_the_routers(
    rng: np.random.Generator, small: ModelConfig
) -> None:
    params, plain = drawn(rng, small), batch_of(rng, small)
    masked = plain._replace(loss_mask=rng.integers(2, size=plain.tokens.shape).astype(float))
    without, _ = loss_and_gradient(params, [plain], small, Objective(EVERY_LOSS))
    with_mask, _ = loss_and_gradient(params, [masked], small, Objective(EVERY_LOSS))
    assert with_mask.loss != without.loss
    for ours, theirs in zip(tree.leaves(with_mask.stats), tree.leaves(without.stats), strict=True):
        assert (ours == theirs).all()


def test_the_token_loss_that_was_chosen_is_the_one_that_is_minimised(
    rng: np.random.Generator, small: ModelConfig
) -> None:
    class Doubled(CrossEntropy):
        def value(self, sums: LossSum) -> tuple[Any, Any]:
            loss, dloss = super().value(sums)
            return 2 * loss, 2 * dloss

        def forward(self, logits: Array, shard: Labelled) -> Any:
            seen.append(logits.shape)
            return super().forward(logits, shard)

    seen: list[tuple[int, ...]] = []
    params, batch = drawn(rng, small), batch_of(rng, small)
    once, gradient = loss_and_gradient(params, [batch], small, Objective())
    twice, doubled = loss_and_gradient(params, [batch], small, Objective(token_loss=Doubled()))
    assert len(seen) == 1
    assert twice.loss == 2 * once.loss
    assert gradient.head is not None
    assert doubled.head is not None
    np.testing.assert_allclose(doubled.head.weight, 2 * gradient.head.weight, rtol=1e-12)
