"""ReMoE against a loop over tokens, its gradient with its own loss, its controller, and the absence of jumps."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core import tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.layers import decoder, moe
from minimoe.layers.mode import Mode
from minimoe.layers.routers import remoe
from minimoe.layers.routers.remoe import ReMoE
from minimoe.layers.routing import RouterStats, by_token, experts_by_token
from minimoe.losses import balance, objective
from minimoe.losses.balance import Coefficients
from minimoe.losses.objective import Objective, Shard
from minimoe.proof.continuity import largest_jump
from minimoe.proof.gradcheck import Ranked, check, check_decoder, failed

EVERY_LOSS = Coefficients(balance=0.5, importance=0.3, load=0.4, z=0.2, sequence=0.6)


def config_of(**changes: Any) -> ModelConfig:
    sizes = {"vocab_size": 11, "width": 4, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 4, "context": 7}
    return ModelConfig(**{**sizes, "experts": 5, "active_experts": 2, "expert_width": 3, "router": "remoe", **changes})


def router_of(w_gate: Any, penalty: float = 0.7) -> ReMoE:
    return ReMoE(np.asarray(w_gate, float), np.full(1, penalty))


def stats_of(counts: list[float], tokens: int, asked: list[float] | None = None) -> RouterStats:
    assignments, asked_of = np.array(counts, float), np.array(asked or counts, float)
    zero = np.zeros(())
    return RouterStats(tokens, assignments, asked_of, asked_of, assignments, zero, zero, zero)


@given(
    batch=st.integers(1, 2),
    context=st.integers(1, 5),
    experts=st.integers(1, 5),
    masked=st.booleans(),
    factor=st.sampled_from([None, 0.5, 100.0]),
    seed=st.integers(0, 2**16),
)
def test_every_gradient_is_right(
    batch: int, context: int, experts: int, masked: bool, factor: float | None, seed: int
) -> None:
    """The weights of the entries, all auxiliary losses, and the router's own loss."""
    rng = np.random.default_rng(seed)
    config = config_of(experts=experts, active_experts=min(2, experts))
    params, x = router_of(rng.standard_normal((4, experts))), rng.standard_normal((batch, context, 4))
    mask = (rng.random((batch, context)) < 0.7).astype(float) if masked else None
    mode = Mode(True, None, factor, balance_by_sequence=True, mask=mask)

    def forward(params: ReMoE, x: np.ndarray) -> tuple[Any, Any]:
        routing, stats, cache = remoe.forward(params, x, config, mode)
        losses, dstats = balance.loss(stats, EVERY_LOSS)
        own, down = remoe.regulariser(params._replace(penalty=np.full(1, 0.7)), stats, config)
        return (routing.weight, balance.weighted(losses, EVERY_LOSS) + own), (cache, tree.add(dstats, down))

    def backward(params: ReMoE, cache: Any, dy: Any) -> tuple[Any, Any]:
        return remoe.backward(params, cache[0], dy[0], tree.map(lambda leaf: leaf * dy[1], cache[1]))

    def routing(params: ReMoE, cache: Any) -> list[Ranked]:
        return [Ranked(scores, k) for scores, k in remoe.compared(params, cache[0])]

    rows = check("remoe", forward, backward, params, x, routing=routing, entries=10, directions=2)
    assert all(row.passed or 2 * row.refused > row.refused + row.checked for row in rows), failed(rows)


def test_the_whole_loss_contains_the_routers_own_with_its_gradient() -> None:
    """In a decoder with a large λ; the state is held fixed, because the loss has no gradient for it."""
    config = config_of(context=4, head_width=2)
    rows = check_decoder("remoe", config, np.random.default_rng(1), padding=1, shards=2, entries=2)
    rows = [row for row in rows if "penalty" not in row.tensor]
    assert len(rows) > 10 and all(row.passed for row in rows), failed(rows)
    tokens = np.random.default_rng(2).integers(11, size=(2, 4))
    params = decoder.init(np.random.default_rng(0), config, np.float64)
    for block in params.blocks:
        block.moe.router.penalty[:] = 3.0
    done = objective.forward(params, Shard(tokens, tokens), config, Objective())
    totals = objective.add_up(params, [done], config, Objective())
    own = sum(
        3.0 * (5 / (2 * 8) * layer.assignments * layer.probability / 8).sum() for layer in totals.stats
    )  # E / (K N), and the mean over N
    assert float(totals.total - totals.loss) == pytest.approx(own, rel=1e-12)


def test_it_agrees_with_a_loop_over_tokens(rng: np.random.Generator) -> None:
    config = config_of()
    params, x = router_of(rng.standard_normal((4, 5))), rng.standard_normal((2, 6, 4))
    mask = np.ones((2, 6))
    mask[1, 4:] = 0
    x[1, 4:] = x.reshape(-1, 4)[(x.reshape(-1, 4) @ params.w_gate > 0).sum(1).argmax()]  # padding wakes several
    routing, stats, _ = remoe.forward(params, x, config, Mode(True, mask=mask, balance_by_sequence=True))
    experts, weights = experts_by_token(routing), by_token(routing.weight, routing.place)
    counts, asked = np.zeros((2, 2, 5))  # of each sequence
    entropy, most = 0.0, 0
    for t, token in enumerate(x.reshape(-1, 4)):
        z = [sum(token[d] * params.w_gate[d, e] for d in range(4)) for e in range(5)]
        awake = sorted((e for e in range(5) if z[e] > 0), key=lambda e: -z[e])
        most = max(most, len(awake))
        assert [e for e in experts[t] if e >= 0] == awake, "best first"
        assert weights[t][: len(awake)] == pytest.approx([z[e] for e in awake])
        assert not weights[t][len(awake) :].any()
        if mask.reshape(-1)[t]:
            total = sum(z[e] for e in awake)
            for e in awake:
                counts[t // 6, e] += 1
                asked[t // 6, e] += z[e]
                entropy -= z[e] / total * math.log(z[e] / total)
    assert routing.place.shape == (12, most)
    within = sum(5 * (counts[b] / counts[b].sum() * asked[b]).sum() for b in range(2))
    one, two = counts.sum(0), asked.sum(0)
    expected = RouterStats(10, one, two, two, one, np.zeros(()), within, entropy)
    for name, mine, theirs in zip(RouterStats._fields, stats, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, err_msg=name)
    loss, _ = remoe.regulariser(params, stats, config)
    f = 5 * one / (2 * 10)
    assert float(loss) == pytest.approx(0.7 * sum(f[e] * two[e] / 10 for e in range(5)))


def test_renamed_experts_are_the_same_experts(rng: np.random.Generator) -> None:
    config, order = config_of(), rng.permutation(5)
    w_gate, x = rng.standard_normal((4, 5)), rng.standard_normal((2, 5, 4))
    one, stats, _ = remoe.forward(router_of(w_gate), x, config)
    other, renamed, _ = remoe.forward(router_of(w_gate[:, order]), x, config)
    names = np.append(order, -1)
    np.testing.assert_array_equal(names[experts_by_token(other)], experts_by_token(one))
    np.testing.assert_allclose(by_token(other.weight, other.place), by_token(one.weight, one.place), rtol=1e-12)
    for name in ("assignments", "probability", "importance", "load"):
        np.testing.assert_allclose(getattr(renamed, name), getattr(stats, name)[order], rtol=1e-12)


# No jumps


def mixture_of(router: str) -> tuple[moe.MoE, ModelConfig, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    config = config_of(router=router, noisy_gating=False, width=8, experts=6)
    params = tree.map(lambda leaf: leaf + 0.4 * rng.standard_normal(leaf.shape), moe.init(rng, config, None, float))
    return params, config, *rng.standard_normal((2, 8))


def test_the_output_is_continuous_where_an_expert_leaves_and_that_of_top_k_is_not() -> None:
    jumps = {}
    for router in ("remoe", "noisy_top_k"):
        params, config, a, b = mixture_of(router)

        def output(s: float, params: Any = params, config: Any = config, a: Any = a, b: Any = b) -> np.ndarray:
            return moe.forward(params, ((1 - s) * a + s * b)[None, None], config).y[0, 0]

        jumps[router] = largest_jump(output)
    assert jumps["remoe"] < 1e-9
    assert jumps["noisy_top_k"] > 1e-2


def test_across_the_point_where_an_expert_falls_asleep_the_output_changes_by_less_than_a_step() -> None:
    params, config, a, b = mixture_of("remoe")
    z = np.array([a, b]) @ params.router.w_gate
    expert = int(np.argmax((z[0] > 0) & (z[1] < 0)))
    s = z[0, expert] / (z[0, expert] - z[1, expert])
    before, after = (moe.forward(params, ((1 - at) * a + at * b)[None, None], config) for at in (s - 5e-8, s + 5e-8))
    assert before.stats.assignments[expert] == 1 and after.stats.assignments[expert] == 0
    assert np.linalg.norm(before.y - after.y) < 1e-5 * max(np.linalg.norm(before.y), 1)


# Who is awake


def test_a_token_that_wakes_nobody_gets_zero(rng: np.random.Generator) -> None:
    config = config_of()
    params = moe.init(rng, config, dtype=np.float64)
    params.router.w_gate[:] = -1
    x = abs(rng.standard_normal((1, 4, 4)))
    for wakes_some in (False, True):
        x[0, 2] *= -1 if wakes_some else 1
        with np.errstate(all="raise"):
            result = moe.forward(params, x, config)
            dstats = remoe.regulariser(params.router, result.stats, config)[1]
            dx, grads = moe.backward(params, result.cache, np.ones_like(x), dstats)
        asleep = [t for t in range(4) if not (wakes_some and t == 2)]
        assert not result.y[0, asleep].any() and not dx[0, asleep].any()
        assert bool(result.y[0, 2].any()) == wakes_some
        assert sum(result.cache.routing.counts) == 5 * wakes_some
        assert all(np.isfinite(leaf).all() for leaf in tree.leaves((result.y, dx, grads, result.stats[1:])))
    assert remoe.decode(params.router, x[0, 0], config) == ([], [])


def test_about_half_of_the_experts_are_awake_at_the_start(rng: np.random.Generator) -> None:
    config = config_of(width=64, experts=64)
    params, x = remoe.init(rng, config), rng.standard_normal((1, 200, 64)).astype(np.float32)
    share = remoe.forward(params, x, config)[1].assignments / 200
    assert 0.4 < share.mean() < 0.6
    assert (x[0] @ params.w_gate).std() == pytest.approx(0.5, rel=0.1)
    assert params.penalty == pytest.approx(1e-8)


def test_an_expert_that_is_exactly_at_zero_sleeps() -> None:
    routing, stats, _ = remoe.forward(router_of(np.zeros((4, 5))), np.ones((1, 3, 4)), config_of())
    assert routing.counts == [0] * 5 and not stats.assignments.any()
    assert routing.place.shape == (3, 1), "one column at least, and nothing in it"


def test_one_token_is_written_by_the_experts_that_it_wakes() -> None:
    params = router_of([[1, -1, 0, 2, 0.5]] * 4)
    chosen, weights = remoe.decode(params, np.full(4, 0.25), config_of())
    assert (chosen, weights) == ([0, 3, 4], [1, 2, 0.5])


# The capacity


def test_only_real_entries_take_a_place() -> None:
    """Expert 0 is wanted by all, expert 1 by the last two of six tokens; ⌈0.5 · 2 · 6 / 2⌉ = 3 places each."""
    config = config_of(width=2, experts=2, active_experts=2)
    x = np.array([[[1.0, -1], [1, -1], [1, -1], [1, -1], [1, 1], [1, 1]]])
    mode = Mode(True, None, 0.5)
    routing, stats, _ = remoe.forward(router_of(np.eye(2)), x, config, mode)
    assert (routing.counts, int(routing.dropped)) == ([3, 2], 3)
    np.testing.assert_array_equal(stats.assignments, [6, 2], "a refused entry counts as awake")
    mask = np.array([[0.0, 0, 1, 1, 1, 1]])
    routing, stats, _ = remoe.forward(router_of(np.eye(2)), x, config, mode._replace(mask=mask))
    assert (routing.counts, int(routing.dropped)) == ([2, 2], 2)  # ⌈0.5 · 2 · 4 / 2⌉ = 2
    np.testing.assert_array_equal(routing.token, [2, 3, 4, 5])
    np.testing.assert_array_equal(stats.assignments, [4, 2])


# The controller


@pytest.mark.parametrize(
    ("awake", "factor"),
    [([6, 6], 1.0), ([7, 6], 1.2), ([12, 1], 1.2), ([6, 5], 1 / 1.2), ([0, 0], 1 / 1.2)],
)
def test_lambda_follows_the_zeros_of_all_layers_together(awake: list[int], factor: float) -> None:
    """K = 2 of 6 experts for 3 tokens: 12 entries in two layers are on target."""
    config = config_of(experts=6, active_experts=2)
    layers = [stats_of([count, 0, 0, 0, 0, 0], tokens=3) for count in awake]
    before = [router_of(np.ones((4, 6)), 0.01), router_of(np.zeros((4, 6)), 0.01)]
    after = remoe.next_state(before, layers, config, TrainConfig())
    assert [layer.penalty for layer in after] == [pytest.approx(0.01 * factor)] * 2
    assert all(new.w_gate is old.w_gate for new, old in zip(after, before, strict=True))


def test_a_lambda_that_fell_for_a_long_time_rises_again() -> None:
    """In float32, 600 steps with too few experts awake would round λ to a number that a fifth does not change."""
    config = config_of(experts=6, active_experts=2)
    layer = [ReMoE(np.ones((4, 6), np.float32), np.full(1, 1e-8, np.float32))]
    few, many = [stats_of([0] * 6, tokens=3)], [stats_of([3] * 6, tokens=3)]
    for _ in range(600):
        layer = remoe.next_state(layer, few, config, TrainConfig())
    low = layer[0].penalty
    assert low.dtype == np.float32 and 0 < low < 1e-20
    for steps in range(1, 4):
        layer = remoe.next_state(layer, many, config, TrainConfig())
        assert layer[0].penalty / low == pytest.approx(1.2**steps)


def test_a_busy_expert_is_more_expensive() -> None:
    """f is 1 at the target; with E = 2 and K = 1, f = 2 n / N."""
    config = config_of(experts=2, active_experts=1)
    loss, gradient = remoe.regulariser(router_of(np.ones((4, 2)), 0.5), stats_of([3, 1], 4, [1.0, 2.0]), config)
    assert float(loss) == pytest.approx(0.5 * (1.5 * 1.0 / 4 + 0.5 * 2.0 / 4))
    np.testing.assert_allclose(gradient.probability, [0.5 * 1.5 / 4, 0.5 * 0.5 / 4])
    assert not any(np.any(leaf) for leaf in gradient._replace(probability=np.zeros(2)))


def test_no_other_loss_is_on_by_default_and_the_z_loss_has_nothing_to_bound() -> None:
    config = config_of()
    assert moe.balance_coefficient(config) == 0
    _, stats, _ = remoe.forward(router_of(np.ones((4, 5))), np.ones((1, 3, 4)), config)
    losses, _ = balance.loss(stats, EVERY_LOSS)
    assert float(losses.z) == 0 and float(losses.balance) > 0


def test_without_auxiliary_losses_only_the_weights_teach(rng: np.random.Generator) -> None:
    config = config_of()
    params, x = remoe.init(rng, config, np.float64), rng.standard_normal((1, 5, config.width))
    routing, stats, cache = remoe.forward(params, x, config, Mode())
    dweight = rng.standard_normal(len(routing.weight))
    zeros = tree.map(lambda leaf: np.zeros_like(np.asarray(leaf, float)), stats)
    alone, with_zeros = (remoe.backward(params, cache, dweight, dstats) for dstats in (None, zeros))
    for one, other in zip(tree.leaves(alone), tree.leaves(with_zeros), strict=True):
        np.testing.assert_array_equal(one, other)
