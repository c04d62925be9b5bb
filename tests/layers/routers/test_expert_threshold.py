"""Expert threshold against a loop over tokens, its gradient, its capacity, and thresholds that find their quantile."""

import dataclasses
import math
from typing import Any

import numpy as np
import on_devices
import pytest
import strict_cupy
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core import tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.inference import generation, kv_cache
from minimoe.layers import decoder, moe
from minimoe.layers.mode import Mode
from minimoe.layers.routers import expert_choice, expert_threshold
from minimoe.layers.routers.expert_choice import ExpertChoice
from minimoe.layers.routers.expert_threshold import ExpertThreshold
from minimoe.layers.routing import RouterStats, by_token, experts_by_token
from minimoe.losses import balance
from minimoe.losses.balance import Coefficients
from minimoe.optim import optimizer
from minimoe.parallel import exchange
from minimoe.parallel.processes import can_fork
from minimoe.proof.gradcheck import Ranked, check, failed
from minimoe.training import step

EVERY_LOSS = Coefficients(balance=0.5, importance=0.3, load=0.4, z=0.2, sequence=0.6)
CONFIG = ModelConfig(
    vocab_size=11,
    width=4,
    layers=2,
    heads=2,
    kv_heads=1,
    head_width=4,
    context=30,
    experts=5,
    active_experts=2,
    expert_width=3,
    router="expert_threshold",
)


def params_of(rng: np.random.Generator, experts: int = 5) -> ExpertThreshold:
    return ExpertThreshold(rng.standard_normal((4, experts)), rng.uniform(0.05, 0.5, experts))


@given(
    batch=st.integers(1, 2),
    context=st.integers(1, 6),
    experts=st.integers(1, 5),
    active=st.integers(1, 5),
    masked=st.booleans(),
    factor=st.sampled_from([None, 0.5, 1.7, 100.0]),
    seed=st.integers(0, 2**16),
)
def test_every_gradient_is_right(
    batch: int, context: int, experts: int, active: int, masked: bool, factor: float | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    config = dataclasses.replace(CONFIG, experts=experts, active_experts=min(active, experts))
    params, x = params_of(rng, experts), rng.standard_normal((batch, context, 4))
    mask = (rng.random((batch, context)) < 0.7).astype(float) if masked else None
    mode = Mode(True, None, factor, balance_by_sequence=True, mask=mask)

    def forward(params: ExpertThreshold, x: np.ndarray) -> tuple[Any, Any]:
        routing, stats, cache = expert_threshold.forward(params, x, config, mode)
        losses, dstats = balance.loss(stats, EVERY_LOSS)
        return (routing.weight, balance.weighted(losses, EVERY_LOSS)), (cache, dstats)

    def backward(params: ExpertThreshold, cache: Any, dy: Any) -> tuple[Any, Any]:
        return expert_threshold.backward(params, cache[0], dy[0], tree.map(lambda leaf: leaf * dy[1], cache[1]))

    def compared(params: ExpertThreshold, cache: Any) -> list[Ranked]:
        return [Ranked(*pair) for pair in expert_threshold.compared(params, cache[0])]

    rows = check("expert_threshold", forward, backward, params, x, routing=compared, entries=10, directions=2)
    assert all(row.passed or 2 * row.refused > row.refused + row.checked for row in rows), failed(rows)


@pytest.mark.parametrize("factor", [None, 0.8])
def test_it_agrees_with_a_loop_over_tokens(factor: float | None, rng: np.random.Generator) -> None:
    params, x = params_of(rng), rng.standard_normal((3, 7, 4))
    mask = np.ones((3, 7))
    mask[1, 4:] = mask[2, :2] = 0
    routing, stats, _ = expert_threshold.forward(params, x, CONFIG, Mode(True, None, factor, mask=mask))
    assignments, probability, importance, kept_by = np.zeros((4, 5))
    squared_lse = entropy = 0.0
    experts, weights = experts_by_token(routing), by_token(routing.weight, routing.place)
    for b in range(3):
        seats = [math.inf if factor is None else math.ceil(factor * 2 * mask[b].sum() / 5)] * 5
        for t in range(7):
            z = [sum(x[b, t, d] * params.w_gate[d, e] for d in range(4)) for e in range(5)]
            total = sum(math.exp(one) for one in z)
            p = [math.exp(one) / total for one in z]
            kept = {}
            if mask[b, t]:
                for e in range(5):
                    if p[e] > params.threshold[e]:
                        assignments[e] += 1
                        importance[e] += p[e]
                        if seats[e] > 0:
                            seats[e] -= 1
                            kept[e] = p[e]
                            kept_by[e] += 1
                probability += p
                squared_lse += math.log(total) ** 2
                entropy -= sum(one * math.log(one) for one in p)
            best_first = sorted(kept, key=lambda e: -kept[e])
            row = 7 * b + t
            assert experts[row].tolist() == best_first + [-1] * (experts.shape[1] - len(kept))
            np.testing.assert_allclose(weights[row, : len(kept)], [kept[e] for e in best_first], rtol=1e-12)
    assert routing.counts == kept_by.tolist()
    assert routing.dropped == assignments.sum() - kept_by.sum()
    assert (routing.dropped > 0) == (factor is not None)
    expected = RouterStats(
        mask.sum(), assignments, probability, importance, assignments, squared_lse, np.zeros(()), entropy
    )
    for name, mine, theirs in zip(RouterStats._fields, stats, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, err_msg=name)


def test_a_token_at_the_threshold_is_not_taken() -> None:
    params = ExpertThreshold(np.zeros((4, 5)), np.array([0.2, 0.2 - 1e-9, 0.2, 0, 1.0]))
    routing, _, _ = expert_threshold.forward(params, np.ones((1, 3, 4)), CONFIG)
    assert routing.counts == [0, 3, 0, 3, 0]
    assert expert_threshold.decode(params, np.ones(4), CONFIG)[0] == [1, 3], "nor when it is written"


def test_the_thresholds_move_by_the_load_relative_to_the_fair_share() -> None:
    """10 tokens, 2 of 5 experts each: 4 assignments are fair."""
    tau = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    stats = RouterStats(10, np.array([4.0, 8, 0, 2, 10]), *[np.zeros(())] * 6)
    (after,) = expert_threshold.next_state([ExpertThreshold(np.ones((4, 5)), tau)], [stats], CONFIG, TrainConfig())
    expected = tau * np.exp([0, 0.05, -0.05, -0.025, 0.075])
    np.testing.assert_allclose(after.threshold, expected, rtol=1e-12)
    assert (after.w_gate == 1).all()


def test_each_layer_has_thresholds_of_its_own() -> None:
    layers = [ExpertThreshold(np.full((4, 5), layer), np.full(5, 0.1 * layer)) for layer in (1.0, 2.0)]
    sums = [RouterStats(10, np.array(load), *[np.zeros(())] * 6) for load in ([4.0, 8, 0, 2, 10], [8.0, 4, 4, 4, 0])]
    for layer, alone, after in zip(
        layers, sums, expert_threshold.next_state(layers, sums, CONFIG, TrainConfig()), strict=True
    ):
        (expected,) = expert_threshold.next_state([layer], [alone], CONFIG, TrainConfig())
        np.testing.assert_array_equal(after.threshold, expected.threshold)
        np.testing.assert_array_equal(after.w_gate, layer.w_gate)


def test_no_tokens_move_no_threshold() -> None:
    tau = np.array([0.1, 0.2], np.float32)
    moved = expert_threshold.moved(tau, np.zeros(2, np.float32), np.float32(0), 1)
    np.testing.assert_array_equal(moved, tau)
    assert moved.dtype == np.float32


def test_the_thresholds_move_on_the_device_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tau, load = np.array([0.1, 0.3], np.float32), np.array([5, 1], np.float32)
    here = expert_threshold.moved(tau, load, 6, 1)
    strict_cupy.install(monkeypatch)
    move = on_devices.mover("gpu", np.float32)
    for tokens in (6, move(np.array(6.0))):
        on_devices.assert_equal(here, expert_threshold.moved(move(tau), move(load), tokens, 1), 1e-6)


@pytest.mark.parametrize("active", [1, 2])
def test_the_thresholds_come_to_rest_where_expert_choice_stops_taking(active: int, rng: np.random.Generator) -> None:
    """On one long sequence that never changes: at the same quantile of each expert's p, whatever the thresholds were.

    The smallest p that expert choice takes of 1000 tokens is known to within one token.
    """
    config = dataclasses.replace(CONFIG, active_experts=active)
    params, x = params_of(rng), rng.standard_normal((1, 1000, 4))
    for _ in range(400):
        _, stats, cache = expert_threshold.forward(params, x, config)
        (params,) = expert_threshold.next_state([params], [stats], config, TrainConfig())
    np.testing.assert_allclose(stats.assignments, 1000 * active / 5, atol=2)
    chosen, _, _ = expert_choice.forward(ExpertChoice(params.w_gate), x, config)
    for e, start in enumerate(range(0, 1000 * active, 200 * active)):
        smallest = chosen.weight[start : start + 200 * active].min()
        share_above = (cache.probability[:, e] > params.threshold[e]).mean()
        assert share_above == pytest.approx((cache.probability[:, e] >= smallest).mean(), abs=0.003)


@pytest.mark.parametrize(("experts", "active"), [(1, 1), (4, 4), (8, 2), (64, 2)])
def test_a_fresh_router_gives_a_token_about_k_experts(experts: int, active: int, rng: np.random.Generator) -> None:
    config = dataclasses.replace(CONFIG, width=64, experts=experts, active_experts=active)
    x = rng.standard_normal((20, 100, 64))
    counts = [
        sum(expert_threshold.forward(expert_threshold.init(rng, config, np.float64), x, config)[0].counts) / 2000
        for _ in range(5)
    ]
    assert np.mean(counts) == pytest.approx(active, rel=0 if experts == active else 0.15)


def test_a_seat_goes_to_the_first_who_comes() -> None:
    """⌈0.5 · 2 · 8 / 4⌉ = 2 seats of each expert for each sequence; padding takes none."""
    config = dataclasses.replace(CONFIG, experts=4)
    params = ExpertThreshold(np.zeros((4, 4)), np.array([0.1, 1, 0.1, 1]))
    mask = np.ones((2, 8))
    routing, stats, _ = expert_threshold.forward(params, np.ones((2, 8, 4)), config, Mode(True, None, 0.5, mask=mask))
    assert routing.token.tolist() == [0, 1, 8, 9] * 2
    assert (routing.dropped, stats.assignments.tolist()) == (24, [16, 0, 16, 0])
    mask[1, [0, 2, 3, 7]] = 0  # four tokens are left, for ⌈0.5 · 2 · 4 / 4⌉ = 1 seat
    routing, _, _ = expert_threshold.forward(params, np.ones((2, 8, 4)), config, Mode(True, None, 0.5, mask=mask))
    assert routing.token.tolist() == [0, 1, 9] * 2


def test_renaming_the_experts_changes_nothing(rng: np.random.Generator) -> None:
    experts = moe.init(rng, CONFIG, dtype=np.float64).experts
    params, x = moe.MoE(params_of(rng), experts), rng.standard_normal((2, 7, 4))
    order = rng.permutation(5)
    router = ExpertThreshold(params.router.w_gate[:, order], params.router.threshold[order])
    renamed = moe.MoE(router, tree.map(lambda leaf: leaf[order], experts))
    one, other = moe.forward(params, x, CONFIG), moe.forward(renamed, x, CONFIG)
    np.testing.assert_allclose(one.y, other.y, atol=1e-12)
    np.testing.assert_allclose(one.stats.importance[order], other.stats.importance)


def test_every_logit_of_a_taken_token_learns_from_its_weight(rng: np.random.Generator) -> None:
    params = ExpertThreshold(rng.standard_normal((4, 5)), np.full(5, 0.25))
    routing, _, cache = expert_threshold.forward(params, rng.standard_normal((1, 1, 4)), CONFIG)
    assert 0 < len(routing.weight) < 5
    _, grads = expert_threshold.backward(params, cache, np.ones(len(routing.weight)), None)
    assert (abs(grads.w_gate).sum(0) > 1e-6).all()
    assert not grads.threshold.any()


def test_a_text_is_written_as_the_whole_model_would_also_by_tokens_without_an_expert(rng: np.random.Generator) -> None:
    """One token at a time with the cache, by ``decode``, gives the logits of the full pass."""
    params = tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), decoder.init(rng, CONFIG, np.float64))
    for block in params.blocks:
        block.moe.router.threshold[...] = rng.uniform(0.15, 0.35, 5)
    tokens = rng.integers(11, size=(1, 20))
    whole = decoder.forward(params, tokens, CONFIG)
    per_token = [(experts_by_token(block.moe.routing) >= 0).sum(1) for block in whole.cache.blocks]
    assert (np.min(per_token), np.max(per_token) > 1) == (0, True)
    cache = kv_cache.init(params, CONFIG)
    for position in range(20):
        logits = generation.extend(params, cache, tokens[:, position : position + 1])[0]
        np.testing.assert_allclose(logits, whole.logits[0, position], atol=1e-12)


@pytest.mark.skipif(not can_fork(), reason="workers are threads on this system, and share no memory of a fixed size")
def test_workers_that_own_experts_have_room_for_tokens_that_go_to_all_of_them(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without thresholds every token has E experts, more than the K for which rows_at_once counts."""
    monkeypatch.setattr(exchange, "exchange_is_faster", lambda *_: True)
    recipe = TrainConfig(batch=4, warmup=0, dtype="float64", optimizer="adamw")
    tokens, targets = rng.integers(11, size=(2, 4, 30))
    after = []
    for workers in (1, 2):
        params = decoder.init(np.random.default_rng(0), CONFIG, np.float64)
        for block in params.blocks:
            block.moe.router.threshold[...] = 0.01
        moments = optimizer.init(params, recipe)
        with step.open_workers(params, moments, CONFIG, recipe, workers) as opened:
            shards = step.shard_batch(rng, opened.params, tokens, targets, CONFIG, recipe, workers)
            totals, _ = opened.step(shards, 0)
            after.append(tree.map(np.copy, opened.params))
        assert totals.stats[0].assignments.tolist() == [4 * 30] * 5
    for one, other in zip(*map(tree.leaves, after), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)


def test_one_token_is_decoded_to_the_entries_of_the_layer_best_first(rng: np.random.Generator) -> None:
    params = ExpertThreshold(rng.standard_normal((4, 5)), np.full(5, 0.1))
    for x in rng.standard_normal((20, 4)):
        routing, _, _ = expert_threshold.forward(params, x[None, None], CONFIG)
        experts, weights = expert_threshold.decode(params, x, CONFIG)
        assert experts == experts_by_token(routing)[0].tolist()
        assert weights == pytest.approx(by_token(routing.weight, routing.place)[0].tolist(), rel=1e-12)
