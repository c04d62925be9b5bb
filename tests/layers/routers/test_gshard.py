"""The GShard router against a loop over tokens, its gradient on every path, its chance and its capacity."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import decoder, moe
from minimoe.layers.mode import EVALUATION, Mode
from minimoe.layers.routers import gshard
from minimoe.layers.routers.gshard import GShard
from minimoe.layers.routing import RouterStats, by_token, experts_by_token
from minimoe.losses import balance
from minimoe.losses.balance import Coefficients
from minimoe.proof.gradcheck import Ranked, check, failed
from minimoe.storage import huggingface

EVERY_LOSS = Coefficients(balance=0.5, importance=0.3, load=0.4, z=0.2, sequence=0.6)
POLICIES = ["random", "sampling", "all"]


def config_of(**changes: Any) -> ModelConfig:
    sizes = {"vocab_size": 11, "width": 4, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 4, "context": 7}
    return ModelConfig(**{**sizes, "experts": 5, "expert_width": 3, "router": "gshard", **changes})


def with_logits(logits: Any, config: ModelConfig, mode: Mode = EVALUATION) -> tuple[Any, RouterStats, Any]:
    """The routing of one sequence whose tokens have these logits (T, E): x = logits, W = 1."""
    logits = np.asarray(logits, float)
    return gshard.forward(GShard(np.eye(logits.shape[1])), logits[None], config, mode)


@given(
    policy=st.sampled_from(POLICIES),
    batch=st.integers(1, 2),
    context=st.integers(1, 5),
    experts=st.integers(2, 5),
    noisy=st.booleans(),
    masked=st.booleans(),
    factor=st.sampled_from([None, 0.5, 100.0]),
    seed=st.integers(0, 2**16),
)
def test_every_gradient_is_right(
    policy: str, batch: int, context: int, experts: int, noisy: bool, masked: bool, factor: float | None, seed: int
) -> None:
    """The weights of the entries together with the auxiliary losses."""
    rng = np.random.default_rng(seed)
    config = config_of(experts=experts, second_expert=policy, noisy_gating=noisy)
    params, x = GShard(rng.standard_normal((4, experts))), rng.standard_normal((batch, context, 4))
    mask = (rng.random((batch, context)) < 0.7).astype(float) if masked else None
    noise = gshard.draw_noise(rng, config, (batch, context), np.float64)
    mode = Mode(True, noise, factor, balance_by_sequence=True, mask=mask)

    def forward(params: GShard, x: np.ndarray) -> tuple[Any, Any]:
        routing, stats, cache = gshard.forward(params, x, config, mode)
        losses, dstats = balance.loss(stats, EVERY_LOSS)
        return (routing.weight, balance.weighted(losses, EVERY_LOSS)), (cache, dstats)

    def backward(params: GShard, cache: Any, dy: Any) -> tuple[Any, Any]:
        return gshard.backward(params, cache[0], dy[0], tree.map(lambda leaf: leaf * dy[1], cache[1]))

    def routing(params: GShard, cache: Any) -> list[Ranked]:
        return [Ranked(*one) for one in gshard.compared(params, cache[0])]

    rows = check("gshard", forward, backward, params, x, routing=routing, entries=10, directions=2)
    assert all(row.passed or 2 * row.refused > row.refused + row.checked for row in rows), failed(rows)


@pytest.mark.parametrize("policy", POLICIES)
def test_it_agrees_with_a_loop_over_tokens(policy: str, rng: np.random.Generator) -> None:
    """Weights, sums and accepted entries, with padding, chance and a capacity that refuses some."""
    config = config_of(second_expert=policy)
    params, x = GShard(rng.standard_normal((4, 5))), rng.standard_normal((2, 9, 4))
    noise = gshard.draw_noise(rng, config, (2, 9), np.float64)
    mask = np.ones((2, 9))
    mask[1, 6:] = 0
    routing, stats, _ = gshard.forward(params, x, config, Mode(True, noise, 0.9, mask=mask))
    assignments, probability, importance = np.zeros((3, 5))
    squared_lse = entropy = refused = 0.0
    experts, weights = experts_by_token(routing), by_token(routing.weight, routing.place)
    dropped_by_chance = 0
    for b in range(2):
        free = np.full(5, math.ceil(0.9 * 2 * mask[b].sum() / 5))
        for t in range(9):
            row = 9 * b + t
            if not mask[b, t]:
                assert experts[row].tolist() == [-1, -1], "padding goes nowhere"
                continue
            z = [float(x[b, t] @ params.w_gate[:, e]) for e in range(5)]
            total = sum(math.exp(one) for one in z)
            p = [math.exp(one) / total for one in z]
            first = max(range(5), key=lambda e: z[e])
            others = [e for e in range(5) if e != first]
            extra = noise[b, t] if policy == "sampling" else np.zeros(5)
            second = max(others, key=lambda e: z[e] + extra[e])
            g = p[second] / (p[first] + p[second])
            chosen = [(first, 1 - g), (second, g)]
            if policy == "random" and not 2 * g > noise[b, t, 0]:
                chosen, dropped_by_chance = chosen[:1], dropped_by_chance + 1
            for k, (expert, weight) in enumerate(chosen):
                assignments[expert] += 1
                importance[expert] += weight
                free[expert] -= 1
                if free[expert] >= 0:
                    assert (experts[row, k], weights[row, k]) == (expert, pytest.approx(weight))
                else:
                    refused += 1
                    assert experts[row, k] == -1
            assert len(chosen) == 2 or experts[row, 1] == -1
            probability += p
            squared_lse += math.log(total) ** 2
            entropy -= sum(one * math.log(one) for one in p)
    assert (dropped_by_chance > 0) == (policy == "random") and refused > 0
    assert routing.dropped == refused, "what chance drops was not refused by a full expert"
    expected = RouterStats(15, assignments, probability, importance, assignments, squared_lse, np.zeros(()), entropy)
    for name, mine, theirs in zip(RouterStats._fields, stats, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, err_msg=name)


# The second expert


@given(gap=st.floats(0, 6), u=st.floats(0, 1, exclude_max=True))
def test_the_second_expert_is_kept_if_twice_its_weight_is_above_u(gap: float, u: float) -> None:
    g2 = 1 / (1 + math.exp(gap))
    if abs(2 * g2 - u) < 1e-12:
        return
    config = config_of(experts=3, width=3)
    routing, _, cache = with_logits([[gap - 1, -9, -1]], config, Mode(True, np.full((1, 1, 1), u), 1e9))
    weights = by_token(routing.weight, routing.place)[0]
    np.testing.assert_allclose(weights, [1 - g2, g2 if 2 * g2 > u else 0], atol=1e-12)
    assert len(routing.weight) == 1 + (2 * g2 > u)


def test_the_mean_weight_of_the_second_expert_is_twice_its_square() -> None:
    """By 1,000 values of u, evenly spread, instead of drawn ones."""
    u = (np.arange(1000) + 0.5) / 1000
    for g2 in (0.05, 0.2, 0.35, 0.5):
        logits = np.tile([math.log(1 - g2), math.log(g2), -50], (1000, 1))
        routing, stats, _ = with_logits(logits, config_of(experts=3), Mode(True, u[None, :, None], 1e9))
        assert by_token(routing.weight, routing.place)[:, 1].mean() == pytest.approx(2 * g2 * g2, abs=1e-3 * g2)
        assert stats.assignments.tolist() == [1000, pytest.approx(2000 * g2, abs=1), 0]


def test_a_dropped_second_expert_still_teaches_the_gate() -> None:
    logits = [[1.0, 0.4, -2.0]]
    routing, _, cache = with_logits(logits, config_of(experts=3), Mode(True, np.full((1, 1, 1), 0.99), 1e9))
    g2 = 1 / (1 + math.exp(0.6))
    assert routing.counts == [1, 0, 0]
    dx, _ = gshard.backward(GShard(np.eye(3)), cache, np.array([3.0]), None)
    np.testing.assert_allclose(dx[0, 0], [3 * (1 - g2) * g2, -3 * (1 - g2) * g2, 0], rtol=1e-12)


def test_sampling_draws_the_second_expert_from_the_probabilities_of_the_rest(rng: np.random.Generator) -> None:
    logits, draws = np.array([0.3, 2.0, 1.0, -0.5, 0.0]), 20_000
    config = config_of(second_expert="sampling", width=5)
    noise = gshard.draw_noise(rng, config, (1, draws), np.float64)
    routing, _, _ = with_logits(np.tile(logits, (draws, 1)), config, Mode(True, noise, 1e9))
    chosen, weights = experts_by_token(routing), by_token(routing.weight, routing.place)
    assert (chosen[:, 0] == 1).all() and (chosen >= 0).all()
    rest = np.exp(logits) * (np.arange(5) != 1)
    share = np.bincount(chosen[:, 1], minlength=5) / draws
    np.testing.assert_allclose(share, rest / rest.sum(), atol=4 * math.sqrt(0.25 / draws))
    g2 = 1 / (1 + np.exp(logits[1] - logits[chosen[:, 1]]))  # of the logits without their noise
    np.testing.assert_allclose(weights, np.stack([1 - g2, g2], 1), rtol=1e-12)


def test_the_noise_is_what_the_policy_needs(rng: np.random.Generator) -> None:
    u = gshard.draw_noise(rng, config_of(), (2, 30, 40), np.float32)
    gumbel = gshard.draw_noise(rng, config_of(second_expert="sampling"), (2, 30, 40), np.float32)
    assert u is not None and gumbel is not None
    assert (u.shape, u.dtype, gumbel.shape, gumbel.dtype) == ((2, 30, 40, 1), np.float32, (2, 30, 40, 5), np.float32)
    assert 0 <= u.min() < 0.01 and 0.99 < u.max() < 1 and abs(u.mean() - 0.5) < 0.03
    assert abs(np.exp(-gumbel).mean() - 1) < 0.05  # exp of minus Gumbel noise is exponential, with mean 1
    for none in (config_of(second_expert="all"), config_of(noisy_gating=False)):
        assert gshard.draw_noise(rng, none, (2, 3), np.float32) is None


@pytest.mark.parametrize("policy", POLICIES)
def test_chance_belongs_to_training_and_two_evaluations_are_equal(policy: str, rng: np.random.Generator) -> None:
    config = config_of(second_expert=policy)
    params, x = GShard(rng.standard_normal((4, 5))), rng.standard_normal((2, 30, 4))
    noises = [gshard.draw_noise(rng, config, (2, 30), np.float64) for _ in range(2)]
    one, other, plain = (gshard.forward(params, x, config, Mode(noise=noise))[0] for noise in (*noises, None))
    for made in (one, other):
        np.testing.assert_array_equal(experts_by_token(made), experts_by_token(plain))
        np.testing.assert_array_equal(made.weight, plain.weight)
    assert (len(plain.weight), plain.dropped) == (2 * 60, 0)
    if policy != "all":
        drawn = [gshard.forward(params, x, config, Mode(True, noise, 1e9))[0] for noise in noises]
        assert experts_by_token(drawn[0]).tolist() != experts_by_token(drawn[1]).tolist()


def test_the_policy_all_and_training_without_noise_are_evaluation_with_a_capacity(rng: np.random.Generator) -> None:
    params, x = GShard(rng.standard_normal((4, 5))), rng.standard_normal((2, 9, 4))
    plain = gshard.forward(params, x, config_of())[0]
    for config in (config_of(second_expert="all"), config_of(noisy_gating=False)):
        made = gshard.forward(params, x, config, Mode(True, None, 1e9))[0]
        assert made.counts == plain.counts
        np.testing.assert_array_equal(made.weight, plain.weight)


# Capacity


def test_an_expert_takes_two_shares_in_training_and_everything_in_evaluation() -> None:
    config = config_of(experts=4, second_expert="all")
    logits = np.tile([3.0, 2.0, 0, 0], (2, 8, 1))  # every token chooses experts 0 and 1
    training, evaluation, named = (
        gshard.forward(GShard(np.eye(4)), logits, config, mode)[0]
        for mode in (Mode(training=True), Mode(), Mode(training=True, capacity_factor=0.5))
    )
    assert (training.counts, training.dropped) == ([8, 8, 0, 0], 16)  # 2 · 8 / 4 = 4 of each sequence
    np.testing.assert_array_equal(training.token[:8], [0, 1, 2, 3, 8, 9, 10, 11])  # first come, first served
    assert (evaluation.counts, evaluation.dropped) == ([16, 16, 0, 0], 0)
    assert (named.counts, named.dropped) == ([4, 4, 0, 0], 24)


def test_a_dropped_second_expert_takes_no_place() -> None:
    """Four tokens want expert 1 second; the first two of them lose it by chance, so the other two find it free."""
    u = np.array([0.99, 0.99, 0, 0])[None, :, None]
    routing, _, _ = with_logits(np.tile([1.0, 0.0, -9], (4, 1)), config_of(experts=3), Mode(True, u, 0.6))
    assert routing.counts == [2, 2, 0]  # ⌈0.6 · 8 / 3⌉ = 2
    np.testing.assert_array_equal(routing.token, [0, 1, 2, 3])
    assert routing.dropped == 2, "two first choices"


def test_a_later_token_never_costs_an_earlier_one_its_place(rng: np.random.Generator) -> None:
    """The authors' order, all first choices before any second, would."""
    config = config_of(experts=3, second_expert="all")
    logits = np.array([[2.0, 1, 0], [0, 1, 2], [2, 0, 1]])
    for changed in itertools.permutations([0.0, 1, 2]):
        logits[2] = changed
        routing, _, _ = with_logits(logits, config, Mode(True, None, 0.5))  # one place each
        assert experts_by_token(routing)[:2].tolist() == [[0, 1], [2, -1]]


# The rest


@pytest.mark.parametrize("active", [1, 3])
def test_other_than_two_experts_are_refused_in_a_sentence(rng: np.random.Generator, active: int) -> None:
    with pytest.raises(UserError, match=f"active_experts {active} .*'gshard'.*set active_experts to 2"):
        decoder.init(rng, config_of(active_experts=active))
    with pytest.raises(UserError, match="second_expert 'none' is unknown: choose one of random, sampling, all"):
        config_of(second_expert="none")


@pytest.mark.parametrize("experts", [2, 5])
@pytest.mark.parametrize("policy", POLICIES)
def test_extreme_equal_and_zero_inputs_give_finite_numbers(policy: str, experts: int, rng: np.random.Generator) -> None:
    config = config_of(experts=experts, second_expert=policy)
    params = moe.init(rng, config, dtype=np.float64)
    params.router.w_gate[...] = rng.standard_normal((4, experts))
    x = rng.standard_normal((2, 6, 4))
    for scaled in (x, 1e4 * x, 0 * x, x[:, :1].repeat(6, axis=1)):
        mode = Mode(True, gshard.draw_noise(rng, config, (2, 6), np.float64), balance_by_sequence=True)
        with np.errstate(all="raise", under="ignore"):
            y, stats, _, cache = moe.forward(params, scaled, config, mode)
            dstats = tree.map(lambda leaf: np.ones_like(np.asarray(leaf, float)), stats)
            dx, gradient = moe.backward(params, cache, np.ones_like(x), dstats)
        assert all(np.isfinite(leaf).all() for leaf in tree.leaves((y, dx, gradient, stats[1:])))
        chosen = experts_by_token(cache.routing)
        assert not ((chosen[:, 0] == chosen[:, 1]) & (chosen[:, 0] >= 0)).any()


def test_the_lowest_indices_win_a_tie_in_every_form() -> None:
    routing, _, _ = gshard.forward(GShard(np.zeros((4, 5))), np.ones((1, 3, 4)), config_of())
    assert routing.counts == [3, 3, 0, 0, 0]
    assert gshard.decode(GShard(np.zeros((4, 5))), np.ones(4), config_of()) == ([0, 1], [0.5, 0.5])


@given(seed=st.integers(0, 2**16), scale=st.sampled_from([0.1, 1.0, 1e4]))
def test_one_token_is_decoded_as_it_is_routed(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    params, x = GShard(rng.standard_normal((4, 5))), scale * rng.standard_normal(4)
    routing, _, _ = gshard.forward(params, x[None, None], config_of())
    experts, weights = gshard.decode(params, x, config_of())
    assert experts == experts_by_token(routing)[0].tolist()
    np.testing.assert_allclose(weights, by_token(routing.weight, routing.place)[0], rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("policy", POLICIES)
def test_renumbered_experts_are_the_same_experts(policy: str, rng: np.random.Generator) -> None:
    config, order = config_of(second_expert=policy), rng.permutation(5)
    params, x = moe.init(rng, config, dtype=np.float64), rng.standard_normal((2, 9, 4))
    params.router.w_gate[...] = rng.standard_normal((4, 5))
    renumbered = params._replace(
        router=GShard(params.router.w_gate[:, order]), experts=tree.map(lambda leaf: leaf[order], params.experts)
    )
    noise = gshard.draw_noise(rng, config, (2, 9), np.float64)
    theirs = noise[..., order] if policy == "sampling" and noise is not None else noise
    y, stats, dropped, cache = moe.forward(params, x, config, Mode(True, noise, 0.8))
    other = moe.forward(renumbered, x, config, Mode(True, theirs, 0.8))
    np.testing.assert_allclose(other.y, y, atol=1e-12)
    np.testing.assert_allclose(other.stats.assignments, stats.assignments[order])
    assert other.dropped == dropped
    dx, _ = moe.backward(params, cache, x, None)
    np.testing.assert_allclose(moe.backward(renumbered, other.cache, x, None)[0], dx, atol=1e-12)


def test_a_trained_model_is_a_mixtral(rng: np.random.Generator, tmp_path: Path) -> None:
    """In evaluation the router is Mixtral's, so the model can be written as one and computes the same."""
    config = config_of()
    params = tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), decoder.init(rng, config, np.float64))
    huggingface.save(tmp_path / "mixtral", params, config)
    loaded, theirs = huggingface.load_params(tmp_path / "mixtral")
    assert theirs.router == "noisy_top_k"
    tokens = rng.integers(11, size=(2, 7))
    ours = decoder.forward(params, tokens, config).logits
    np.testing.assert_allclose(decoder.forward(loaded, tokens, theirs).logits, ours, rtol=1e-4, atol=1e-4)
