"""The Switch router against a loop over tokens, its gradient on every path, its jitter and its capacity."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.evaluate import text_loss
from minimoe.inference import generation, kv_cache
from minimoe.layers import decoder, moe
from minimoe.layers.mode import Mode
from minimoe.layers.routers import switch
from minimoe.layers.routers.switch import Switch
from minimoe.layers.routing import RouterStats, by_token, experts_by_token
from minimoe.losses import balance, objective
from minimoe.losses.balance import Coefficients
from minimoe.losses.objective import Objective, Shard
from minimoe.proof.gradcheck import Ranked, check, failed

EVERY_LOSS = Coefficients(balance=0.5, importance=0.3, load=0.4, z=0.2, sequence=0.6)


def config_of(**changes: Any) -> ModelConfig:
    sizes = {"vocab_size": 11, "width": 4, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 4, "context": 7}
    return ModelConfig(**{**sizes, "experts": 5, "active_experts": 1, "expert_width": 3, "router": "switch", **changes})


def check_switch(params: Switch, x: np.ndarray, config: ModelConfig, mode: Mode) -> list[Any]:
    """Checks the weights of the entries together with the auxiliary losses."""

    def forward(params: Switch, x: np.ndarray) -> tuple[Any, Any]:
        routing, stats, cache = switch.forward(params, x, config, mode)
        losses, dstats = balance.loss(stats, EVERY_LOSS)
        return (routing.weight, balance.weighted(losses, EVERY_LOSS)), (cache, dstats)

    def backward(params: Switch, cache: Any, dy: Any) -> tuple[Any, Any]:
        return switch.backward(params, cache[0], dy[0], tree.map(lambda leaf: leaf * dy[1], cache[1]))

    def routing(params: Switch, cache: Any) -> list[Ranked]:
        return [Ranked((x.reshape(-1, config.width) * jitter_of(mode, x)) @ params.w_gate, 1)]

    return check("switch", forward, backward, params, x, routing=routing, entries=10, directions=2)


def jitter_of(mode: Mode, x: np.ndarray) -> Any:
    return 1.0 if mode.noise is None else mode.noise.reshape(-1, x.shape[-1])


@given(
    batch=st.integers(1, 2),
    context=st.integers(1, 5),
    experts=st.integers(1, 5),
    jitter=st.booleans(),
    masked=st.booleans(),
    factor=st.sampled_from([None, 0.5, 1.0, 100.0]),
    seed=st.integers(0, 2**16),
)
def test_every_gradient_is_right(
    batch: int, context: int, experts: int, jitter: bool, masked: bool, factor: float | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    config = config_of(experts=experts)
    params, x = Switch(rng.standard_normal((4, experts))), rng.standard_normal((batch, context, 4))
    mask = (rng.random((batch, context)) < 0.7).astype(float) if masked else None
    noise = rng.uniform(0.5, 1.5, x.shape) if jitter else None  # far more than 1 %, so that a forgotten factor shows
    rows = check_switch(params, x, config, Mode(True, noise, factor, balance_by_sequence=True, mask=mask))
    assert all(row.passed or 2 * row.refused > row.refused + row.checked for row in rows), failed(rows)


def test_it_agrees_with_a_loop_over_tokens(rng: np.random.Generator) -> None:
    config = config_of()
    params, x = Switch(rng.standard_normal((4, 5))), rng.standard_normal((2, 6, 4))
    noise = rng.uniform(0.5, 1.5, x.shape)
    mask = np.ones((2, 6))
    mask[1, 4:] = 0
    routing, stats, _ = switch.forward(params, x, config, Mode(True, noise, 1e9, mask=mask))
    assignments, probability, importance = np.zeros((3, 5))
    squared_lse = entropy = 0.0
    experts, weights = experts_by_token(routing), by_token(routing.weight, routing.place)
    for t, token in enumerate((x * noise).reshape(-1, 4)):
        z = [sum(token[d] * params.w_gate[d, e] for d in range(4)) for e in range(5)]
        total = sum(math.exp(one) for one in z)
        p = [math.exp(one) / total for one in z]
        best = max(range(5), key=lambda e: p[e])
        if mask.reshape(-1)[t]:
            assert experts[t] == [best]
            assert weights[t] == pytest.approx([p[best]])
            assignments[best] += 1
            importance[best] += p[best]
            probability += p
            squared_lse += math.log(total) ** 2
            entropy -= sum(one * math.log(one) for one in p)
        else:
            assert experts[t] == [-1], "padding goes nowhere"
    expected = RouterStats(10, assignments, probability, importance, assignments, squared_lse, np.zeros(()), entropy)
    for name, mine, theirs in zip(RouterStats._fields, stats, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, err_msg=name)


def test_an_expert_takes_a_quarter_more_than_its_share_in_training_and_everything_in_evaluation() -> None:
    config = config_of(experts=4)
    w_gate = np.zeros((4, 4))
    w_gate[:, 2] = 1  # every token chooses expert 2
    x = np.ones((2, 8, 4))
    training, evaluation, named = (
        switch.forward(Switch(w_gate), x, config, mode)[0]
        for mode in (Mode(training=True), Mode(), Mode(training=True, capacity_factor=0.5))
    )
    assert training.counts == [0, 0, 6, 0]  # ⌈1.25 · 8 / 4⌉ = 3 of each sequence
    assert training.dropped == 10
    np.testing.assert_array_equal(training.token, [0, 1, 2, 8, 9, 10])  # first come, first served
    assert (evaluation.counts, evaluation.dropped) == ([0, 0, 16, 0], 0)
    assert (named.counts, named.dropped) == ([0, 0, 2, 0], 14)


def test_a_refused_token_passes_the_layer_as_zero(rng: np.random.Generator) -> None:
    config = config_of(experts=2, noisy_gating=False)
    params = moe.init(rng, config, dtype=np.float64)
    params.router.w_gate[:] = [[1, 0]] * 4
    y, _, dropped, _ = moe.forward(params, abs(rng.standard_normal((1, 8, 4))), config, Mode(training=True))
    assert dropped == 3
    assert [bool(row.any()) for row in y[0]] == [True] * 5 + [False] * 3


def test_every_logit_learns_from_the_weight_of_the_chosen_one(rng: np.random.Generator) -> None:
    config = config_of()
    x = rng.standard_normal((1, 1, 4))
    _, _, cache = switch.forward(Switch(rng.standard_normal((4, 5))), x, config)
    _, grads = switch.backward(Switch(rng.standard_normal((4, 5))), cache, np.ones(1), None)
    assert (abs(grads.w_gate).sum(0) > 1e-6).all()


def test_the_lowest_index_wins_a_tie() -> None:
    routing, _, _ = switch.forward(Switch(np.zeros((4, 5))), np.ones((1, 3, 4)), config_of())
    assert routing.counts == [3, 0, 0, 0, 0]


def test_jitter_is_drawn_around_one_for_every_channel(rng: np.random.Generator) -> None:
    noise = switch.draw_noise(rng, config_of(width=50), (2, 3, 40), np.float32)
    assert noise is not None
    assert (noise.shape, noise.dtype) == ((2, 3, 40, 50), np.float32)
    assert 0.99 <= noise.min() < 0.9901 < 1.0099 < noise.max() <= 1.01
    assert switch.draw_noise(rng, config_of(noisy_gating=False), (2, 3, 40), np.float32) is None


@pytest.mark.parametrize("active", [2, 5])
def test_more_than_one_expert_is_refused_in_a_sentence(rng: np.random.Generator, active: int) -> None:
    with pytest.raises(UserError, match=f"active_experts {active} .*'switch'.*set active_experts to 1"):
        decoder.init(rng, config_of(active_experts=active))


def test_a_text_is_written_as_the_whole_model_would(rng: np.random.Generator) -> None:
    """One token at a time with the cache, by ``decode``, gives the logits of the full pass."""
    config = config_of(context=30)
    params = tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), decoder.init(rng, config, np.float64))
    tokens = rng.integers(11, size=(1, 12))
    whole = decoder.forward(params, tokens, config).logits[0]
    cache = kv_cache.init(params, config)
    for position in range(12):
        logits = generation.extend(params, cache, tokens[:, position : position + 1])[0]
        np.testing.assert_allclose(logits, whole[position], atol=1e-12)


def test_evaluation_refuses_no_token(rng: np.random.Generator) -> None:
    """A router that sends everything to one expert would lose most tokens in training."""
    config = config_of(noisy_gating=False)
    params = decoder.init(rng, config, np.float64)
    params.embedding.table[...] = abs(params.embedding.table)
    for layer in params.blocks:
        layer.moe.router.w_gate[...] = [[5, 0, 0, 0, 0]] * 4
    ids = rng.integers(11, size=config.context + 1).astype(np.int32)
    logits = decoder.forward(params, ids[None, :-1], config).logits[0]
    nats = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), ids[1:]]
    assert text_loss.evaluate(params, config, [ids]).loss == pytest.approx(nats.mean(), rel=1e-12)
    training = objective.forward(params, Shard(ids[None, :-1], ids[None, 1:]), config, Objective())
    assert training.sums.dropped[0] > 0
