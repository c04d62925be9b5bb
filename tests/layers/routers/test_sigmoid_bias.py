"""The sigmoid router against a loop over tokens, its gradient, its groups, and the bias that balances the load."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core import tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError
from minimoe.layers import decoder, moe
from minimoe.layers.mode import Mode
from minimoe.layers.routers import sigmoid_bias
from minimoe.layers.routers.sigmoid_bias import SigmoidBias
from minimoe.layers.routing import RouterStats, by_token, experts_by_token
from minimoe.losses import balance
from minimoe.losses.balance import Coefficients
from minimoe.optim import optimizer
from minimoe.proof.gradcheck import Ranked, check, failed
from minimoe.training import step

EVERY_LOSS = Coefficients(balance=0.5, importance=0.3, load=0.4, z=0.2, sequence=0.6)
GROUPS = {"experts": 6, "active_experts": 4, "expert_groups": 3, "active_groups": 2}


def config_of(**changes: Any) -> ModelConfig:
    sizes = {"vocab_size": 11, "width": 4, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 4, "context": 7}
    others = {"experts": 5, "active_experts": 2, "expert_width": 3, "router": "sigmoid_bias", "routed_scale": 2.5}
    return ModelConfig(**{**sizes, **others, **changes})


def drawn(rng: np.random.Generator, config: ModelConfig) -> SigmoidBias:
    return SigmoidBias(rng.standard_normal((config.width, config.experts)), 0.3 * rng.standard_normal(config.experts))


def check_router(params: SigmoidBias, x: np.ndarray, config: ModelConfig, mode: Mode) -> list[Any]:
    """Checks the weights of the entries together with the auxiliary losses."""

    def forward(params: SigmoidBias, x: np.ndarray) -> tuple[Any, Any]:
        routing, stats, cache = sigmoid_bias.forward(params, x, config, mode)
        losses, dstats = balance.loss(stats, EVERY_LOSS)
        return (routing.weight, balance.weighted(losses, EVERY_LOSS)), (cache, dstats)

    def backward(params: SigmoidBias, cache: Any, dy: Any) -> tuple[Any, Any]:
        return sigmoid_bias.backward(params, cache[0], dy[0], tree.map(lambda leaf: leaf * dy[1], cache[1]))

    def routing(params: SigmoidBias, cache: Any) -> list[Ranked]:
        return [Ranked(scores, k) for scores, k in sigmoid_bias.compared(params, cache[0])]

    return check("sigmoid_bias", forward, backward, params, x, routing=routing, entries=8, directions=2)


@given(
    batch=st.integers(1, 2),
    context=st.integers(1, 5),
    sizes=st.sampled_from([(1, 1, 1, 1), (5, 2, 1, 1), (4, 4, 1, 1), (6, 4, 3, 2), (6, 3, 2, 1), (8, 2, 4, 2)]),
    masked=st.booleans(),
    factor=st.sampled_from([None, 0.5, 100.0]),
    seed=st.integers(0, 2**16),
)
def test_every_gradient_is_right(
    batch: int, context: int, sizes: tuple[int, ...], masked: bool, factor: float | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    names = ("experts", "active_experts", "expert_groups", "active_groups")
    config = config_of(**dict(zip(names, sizes, strict=True)))
    params, x = drawn(rng, config), rng.standard_normal((batch, context, 4))
    mask = (rng.random((batch, context)) < 0.7).astype(float) if masked else None
    rows = check_router(params, x, config, Mode(True, None, factor, balance_by_sequence=True, mask=mask))
    assert all(row.passed or 2 * row.refused > row.refused + row.checked for row in rows), failed(rows)


def by_hand(scores: list[float], bias: list[float], config: ModelConfig) -> list[int]:
    """The experts of one token: of all choices of M groups, the best; then its K best experts."""
    E, K, G, M = config.experts, config.active_experts, config.expert_groups, config.active_groups
    groups = [range(g * E // G, (g + 1) * E // G) for g in range(G)]

    def worth(g: int) -> float:
        return sum(sorted((scores[e] + bias[e] for e in groups[g]), reverse=True)[: K // M])

    active = max(itertools.combinations(range(G), M), key=lambda some: sum(map(worth, some)))
    inside = [e for g in active for e in groups[g]]
    return sorted(inside, key=lambda e: -(scores[e] + bias[e]))[:K]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        GROUPS,  # K/M = 2
        {"experts": 12, "active_experts": 6, "expert_groups": 3, "active_groups": 2},  # K/M = 3
        {"experts": 8, "active_experts": 2, "expert_groups": 4, "active_groups": 2},  # K/M = 1
    ],
)
def test_it_agrees_with_a_loop_over_tokens(rng: np.random.Generator, changes: dict[str, int]) -> None:
    config = config_of(**changes)
    params, x = drawn(rng, config), rng.standard_normal((2, 6, 4))
    mask = np.ones((2, 6))
    mask[1, 4:] = 0
    routing, stats, _ = sigmoid_bias.forward(params, x, config, Mode(True, None, 1e9, mask=mask))
    assignments, probability, importance = np.zeros((3, config.experts))
    squared_lse = entropy = 0.0
    experts, weights = experts_by_token(routing), by_token(routing.weight, routing.place)
    for t, token in enumerate(x.reshape(-1, 4)):
        z = (token @ params.w_gate).tolist()
        s = [1 / (1 + math.exp(-one)) for one in z]
        if not mask.reshape(-1)[t]:
            assert (experts[t] == -1).all(), "padding goes nowhere"
            continue
        chosen = by_hand(s, params.bias.tolist(), config)
        w = [2.5 * s[e] / sum(s[i] for i in chosen) for e in chosen]
        assert experts[t].tolist() == chosen
        np.testing.assert_allclose(weights[t], w, rtol=1e-13)
        p = [one / sum(s) for one in s]
        assignments[chosen] += 1
        importance[chosen] += w
        probability += p
        squared_lse += math.log(sum(map(math.exp, z))) ** 2
        entropy -= sum(one * math.log(one) for one in p)
    expected = RouterStats(10, assignments, probability, importance, assignments, squared_lse, np.zeros(()), entropy)
    for name, mine, theirs in zip(RouterStats._fields, stats, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, err_msg=name)


def test_the_sequence_loss_and_its_gradient_are_those_of_the_paper(rng: np.random.Generator) -> None:
    """α Σ_e f_e P_e for each sequence, f_e = E/(K T) · count, P_e = mean_t s_te/Σ_j s_tj; ds = (u − Σ s̄ u)/Σ_j s_j."""
    config = config_of()
    params, x, alpha = drawn(rng, config), rng.standard_normal((3, 6, 4)), 0.7
    _, stats, cache = sigmoid_bias.forward(params, x, config, Mode(balance_by_sequence=True))
    losses, dstats = balance.loss(stats, Coefficients(sequence=alpha))
    s = 1 / (1 + np.exp(-x @ params.w_gate))  # (B, T, E)
    total, dz = 0.0, np.zeros_like(s)
    for b, sequence in enumerate(s):
        chosen = np.argsort(-(sequence + params.bias))[:, :2]
        f = 5 / (2 * 6) * np.bincount(chosen.reshape(-1), minlength=5)
        normalised = sequence / sequence.sum(1, keepdims=True)
        total += alpha * (f * normalised.mean(0)).sum() / 3
        u = alpha * f / 6 / 3
        ds = (u - (normalised * u).sum(1, keepdims=True)) / sequence.sum(1, keepdims=True)
        dz[b] = ds * sequence * (1 - sequence)
    assert balance.weighted(losses, Coefficients(sequence=alpha)) == pytest.approx(total, rel=1e-13)
    dx, grads = sigmoid_bias.backward(params, cache, np.zeros(36), dstats)
    np.testing.assert_allclose(grads.w_gate, np.einsum("btd,bte->de", x, dz), atol=1e-13)
    np.testing.assert_allclose(dx, dz @ params.w_gate.T, atol=1e-13)


def test_the_bias_chooses_and_does_not_weigh(rng: np.random.Generator) -> None:
    config = config_of()
    params, x = drawn(rng, config), rng.standard_normal((2, 6, 4))
    routing, _, cache = sigmoid_bias.forward(params, x, config)
    same, _, _ = sigmoid_bias.forward(params._replace(bias=params.bias + 3), x, config)
    assert (experts_by_token(routing) == experts_by_token(same)).all()
    np.testing.assert_allclose(same.weight, routing.weight, rtol=1e-13)
    forced, _, _ = sigmoid_bias.forward(params._replace(bias=np.array([0, 0, 0, 9.0, 9.0])), x, config)
    s = np.exp(cache.log_scores)[:, 3:]
    assert (np.sort(experts_by_token(forced), axis=1) == [3, 4]).all()
    both = 2.5 * s / s.sum(1, keepdims=True)
    np.testing.assert_allclose(np.sort(by_token(forced.weight, forced.place), axis=1), np.sort(both, axis=1))


def test_a_small_score_beside_a_large_bias_keeps_its_weight() -> None:
    """(s + b) − b would be 0 in single precision, and the weights 0/0."""
    config = config_of(width=1, experts=3)
    z = np.log(np.array([[1e-8, 3e-8, 0.5]])).astype(np.float32)
    params = SigmoidBias(z, np.array([12, 12, 0], np.float32))
    routing, _, _ = sigmoid_bias.forward(params, np.ones((1, 1, 1), np.float32), config)
    assert routing.counts == [1, 1, 0]
    np.testing.assert_allclose(routing.weight, [2.5 / 4, 2.5 * 3 / 4], rtol=1e-5)


def test_scores_that_all_underflow_still_share_the_weight() -> None:
    config = config_of(width=1, experts=3)
    for z in (-200.0, -1e4):
        params = SigmoidBias(np.full((1, 3), z, np.float32), np.zeros(3, np.float32))
        routing, stats, cache = sigmoid_bias.forward(params, np.ones((1, 1, 1), np.float32), config)
        np.testing.assert_allclose(routing.weight, [1.25, 1.25])
        np.testing.assert_allclose(stats.probability, 1 / 3, rtol=1e-6)
        _, grads = sigmoid_bias.backward(params, cache, np.ones(2, np.float32), None)
        assert np.isfinite(grads.w_gate).all()


def test_negative_biases_lead_nobody_outside_the_active_groups(rng: np.random.Generator) -> None:
    """Scores outside must be −∞: as zeros they would be above every s + b here."""
    config = config_of(**GROUPS)
    params = drawn(rng, config)._replace(bias=np.full(6, -2.0))
    x = rng.standard_normal((2, 20, 4))
    chosen = experts_by_token(sigmoid_bias.forward(params, x, config)[0])
    assert [len({e // 2 for e in row}) for row in chosen.tolist()] == [2] * 40
    unbiased = experts_by_token(sigmoid_bias.forward(params._replace(bias=np.zeros(6)), x, config)[0])
    assert (chosen == unbiased).all()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"active_experts": 1}, "active_experts 1 gives the router 'sigmoid_bias' no gradient"),
        ({"expert_groups": 2}, "expert_groups 2 cannot divide experts 5"),
        ({**GROUPS, "active_groups": 4}, "active_groups 4 is more than expert_groups 3"),
        ({**GROUPS, "active_experts": 3}, "active_groups 2 does not divide active_experts 3"),
        ({**GROUPS, "active_groups": 1}, "active_groups 1 of 3 groups have 2 experts, which is fewer than"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(changes: dict[str, int], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        moe.check(config_of(**changes))
    assert sentence in str(caught.value)
    assert str(caught.value).endswith(".")
    if "expert_groups" in changes:
        with pytest.raises(UserError):
            moe.check_forward(config_of(**changes))


def test_groups_that_just_have_room_are_allowed() -> None:
    moe.check(config_of(**GROUPS))
    moe.check(config_of(experts=8, active_experts=8, expert_groups=4, active_groups=4))
    moe.check(config_of(experts=1, active_experts=1))
    moe.check_forward(config_of(active_experts=1))


def sums(assignments: list[float]) -> RouterStats:
    counts, zero = np.array(assignments), np.zeros(())
    return RouterStats(counts.sum(), counts, counts, counts, counts, zero, zero, zero)


def test_the_bias_of_the_busy_falls_and_of_the_idle_rises_by_the_rate() -> None:
    before = [SigmoidBias(np.zeros((4, 4)), np.array([0.1, 0, 0, 0])), SigmoidBias(np.zeros((4, 4)), np.zeros(4))]
    stats = [sums([3, 5, 4, 4]), sums([0, 0, 0, 100])]
    after = sigmoid_bias.next_state(before, stats, config_of(experts=4), TrainConfig(bias_rate=0.02))
    np.testing.assert_allclose(after[0].bias, [0.12, -0.02, 0, 0])
    np.testing.assert_allclose(after[1].bias, [0.02, 0.02, 0.02, -0.02])
    np.testing.assert_allclose(before[0].bias, [0.1, 0, 0, 0], err_msg="it leaves its argument alone")


def test_the_bias_brings_a_lopsided_load_to_balance(rng: np.random.Generator) -> None:
    config, recipe = config_of(experts=8, active_experts=2), TrainConfig(bias_rate=0.01)
    params, x = drawn(rng, config)._replace(bias=np.zeros(8)), rng.standard_normal((4, 100, 4))
    x[..., 0] += 1  # which makes some experts everyone's favourites
    excess = []
    for _ in range(300):
        _, stats, _ = sigmoid_bias.forward(params, x, config)
        excess.append(stats.assignments.max() / stats.assignments.mean() - 1)
        (params,) = sigmoid_bias.next_state([params], [stats], config, recipe)
    assert excess[0] > 1
    assert np.mean(excess[-50:]) < 0.15


@pytest.mark.parametrize("accumulate", [2, 4])
def test_the_parts_of_a_step_move_the_bias_once(rng: np.random.Generator, accumulate: int) -> None:
    """With parts, forward runs twice for each; the counts of the step are those of one pass over the batch."""
    config = config_of()
    tokens, targets = rng.integers(11, size=(2, 4, 7))
    biases = []
    for parts in (1, accumulate):
        recipe = TrainConfig(batch=4, accumulate=parts, dtype="float64", bias_rate=0.25)
        params = decoder.init(np.random.default_rng(0), config, np.float64)
        shards = step.shard_batch(rng, params, tokens, targets, config, recipe, 1)
        assert len(shards) == parts
        totals, _ = step.train_step(params, optimizer.init(params, recipe), shards, config, recipe, 0)
        assert totals.stats[0].assignments.sum() == 4 * 7 * 2
        biases.append(np.stack([block.moe.router.bias for block in params.blocks]))
    np.testing.assert_array_equal(*biases)
    assert set(np.unique(abs(biases[0]))) <= {0, 0.25}
    assert biases[0].any()


def test_a_recipe_that_names_no_balance_loss_uses_none() -> None:
    assert step.objective_of(config_of(), TrainConfig()).coefficients.balance == 0
    assert step.objective_of(config_of(), TrainConfig(balance_loss=0.02)).coefficients.balance == 0.02


def test_permuting_the_experts_permutes_everything(rng: np.random.Generator) -> None:
    config, order = config_of(), np.array([3, 0, 4, 1, 2])
    params, x = drawn(rng, config), rng.standard_normal((2, 6, 4))
    routing, stats, cache = sigmoid_bias.forward(params, x, config, Mode(balance_by_sequence=True))
    moved = SigmoidBias(params.w_gate[:, order], params.bias[order])
    again, same, other = sigmoid_bias.forward(moved, x, config, Mode(balance_by_sequence=True))
    assert (order[experts_by_token(again)] == experts_by_token(routing)).all()
    np.testing.assert_allclose(by_token(again.weight, again.place), by_token(routing.weight, routing.place))
    np.testing.assert_allclose(same.probability, stats.probability[order])
    np.testing.assert_allclose(same.by_sequence, stats.by_sequence)
    np.testing.assert_array_equal(same.assignments, stats.assignments[order])


def test_the_lowest_index_wins_a_tie_among_experts_and_among_groups() -> None:
    flat = SigmoidBias(np.zeros((4, 6)), np.zeros(6))
    assert sigmoid_bias.forward(flat, np.ones((1, 3, 4)), config_of(experts=6))[0].counts == [3, 3, 0, 0, 0, 0]
    assert sigmoid_bias.forward(flat, np.ones((1, 3, 4)), config_of(**GROUPS))[0].counts == [3, 3, 3, 3, 0, 0]


@pytest.mark.parametrize("changes", [{}, GROUPS])
def test_one_token_is_routed_as_among_many(rng: np.random.Generator, changes: dict[str, int]) -> None:
    config = config_of(**changes)
    params, x = drawn(rng, config), rng.standard_normal((1, 9, 4))
    routing, _, _ = sigmoid_bias.forward(params, x, config)
    for t in range(9):
        experts, weights = sigmoid_bias.decode(params, x[0, t], config)
        assert experts == experts_by_token(routing)[t].tolist()
        np.testing.assert_allclose(weights, by_token(routing.weight, routing.place)[t], rtol=1e-12)


@pytest.mark.parametrize("changes", [{}, GROUPS])
def test_one_token_is_routed_as_among_many_where_single_precision_makes_ties(changes: dict[str, int]) -> None:
    """Saturated scores, and small ones beside a large bias, are equal in float32; the lowest index wins."""
    config = config_of(width=1, **changes)
    for z, bias in (([20, 25, 19, 30, 22, 21], 0), ([-20, -19, -21, -18, -17, -22], 12)):
        params = SigmoidBias(np.array([z[: config.experts]], np.float32), np.full(config.experts, bias, np.float32))
        x = np.ones((1, 1, 1), np.float32)
        routing, _, _ = sigmoid_bias.forward(params, x, config)
        experts, weights = sigmoid_bias.decode(params, x[0, 0], config)
        assert experts == list(range(config.active_experts)) == experts_by_token(routing)[0].tolist()
        np.testing.assert_allclose(weights, by_token(routing.weight, routing.place)[0], rtol=1e-5)


@given(z=st.floats(-1e4, 1e4))
def test_the_logarithm_of_the_sigmoid_is_exact_at_both_ends(z: float) -> None:
    found = float(sigmoid_bias.log_sigmoid(np.array(z)))
    assert found == pytest.approx(-math.log1p(math.exp(-z)) if z > -700 else z, rel=1e-14)
    slope = float(sigmoid_bias._complement(np.array(found), np.array(z)))
    assert slope == pytest.approx(1 / (1 + math.exp(min(z, 700))), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize(
    "changes", [GROUPS, {"experts": 8, "active_experts": 8, "expert_groups": 4, "active_groups": 4}]
)
def test_groups_bear_extreme_equal_and_zero_inputs(rng: np.random.Generator, changes: dict[str, int]) -> None:
    config = config_of(**changes)
    params, x = drawn(rng, config), rng.standard_normal((2, 5, 4))
    for scaled in (1e4 * x, 0 * x, x[:, :1].repeat(5, axis=1)):
        with np.errstate(all="raise", under="ignore"):
            routing, stats, cache = sigmoid_bias.forward(params, scaled, config, Mode(balance_by_sequence=True))
            dstats = tree.map(lambda leaf: np.ones_like(np.asarray(leaf, float)), stats)
            dx, grads = sigmoid_bias.backward(params, cache, np.ones_like(routing.weight), dstats)
        assert all(np.isfinite(leaf).all() for leaf in tree.leaves((routing.weight, dx, grads, stats[1:])))
        chosen = experts_by_token(routing).tolist()
        size = config.experts // config.expert_groups
        assert all(len({e // size for e in row}) <= config.active_groups for row in chosen)
        assert all(len(set(row)) == config.active_experts for row in chosen)
