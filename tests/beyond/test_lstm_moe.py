"""LSTM → mixture → LSTM: its gradient, one call for all positions, and the settings of its experiment."""

import math
from typing import Any

import numpy as np
import pytest

from minimoe.beyond import lstm, lstm_moe
from minimoe.beyond.lstm_moe import LstmMoe, Prepared, Setting
from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import moe
from minimoe.layers.mode import Mode
from minimoe.losses import balance
from minimoe.losses.balance import Coefficients
from minimoe.proof.gradcheck import Ranked, check, failed

EVERY_LOSS = Coefficients(balance=0.5, importance=0.3, load=0.4, z=0.2)
CONFIG = ModelConfig(vocab_size=7, width=4, context=6, experts=5, active_experts=2, expert_width=3)


def drawn(rng: np.random.Generator, config: ModelConfig = CONFIG, mixture: bool = True) -> LstmMoe:
    params = lstm_moe.init(rng, config, mixture, np.float64)
    return tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), params)


@pytest.mark.parametrize(("batch", "context"), [(2, 4), (1, 5), (3, 1)])
def test_every_gradient_is_right(batch: int, context: int, rng: np.random.Generator) -> None:
    """With noise and with every balancing loss, of the logits and the losses together."""
    tokens = rng.integers(7, size=(batch, context))
    mode = Mode(training=True, noise=rng.standard_normal((batch, context, 5)))

    def forward(params: LstmMoe, x: None) -> tuple[Any, Any]:
        result = lstm_moe.forward(params, tokens, CONFIG, mode)
        assert result.stats is not None
        losses, dstats = balance.loss(result.stats, EVERY_LOSS)
        return (result.logits, balance.weighted(losses, EVERY_LOSS)), (result.cache, dstats)

    def backward(params: LstmMoe, cache: Any, dy: Any) -> tuple[None, LstmMoe]:
        dstats = tree.map(lambda leaf: leaf * dy[1], cache[1])
        return None, lstm_moe.backward(params, cache[0], dy[0], dstats)

    def routing(params: LstmMoe, cache: Any) -> list[Ranked]:
        router = moe.router_of(CONFIG)
        return [Ranked(*found) for found in router.compared(params.moe.router, cache[0].moe.router)]

    rows = check("lstm_moe", forward, backward, drawn(rng), None, routing=routing, entries=6, directions=2)
    assert all(row.passed for row in rows), failed(rows)


def test_every_gradient_of_two_lstms_alone_is_right(rng: np.random.Generator) -> None:
    tokens = rng.integers(7, size=(2, 4))

    def forward(params: LstmMoe, x: None) -> tuple[Any, Any]:
        result = lstm_moe.forward(params, tokens, CONFIG)
        return result.logits, result.cache

    def backward(params: LstmMoe, cache: Any, dy: Any) -> tuple[None, LstmMoe]:
        return None, lstm_moe.backward(params, cache, dy, None)

    rows = check("two LSTMs", forward, backward, drawn(rng, mixture=False), None, entries=6, directions=2)
    assert {row.tensor.partition(".")[0] for row in rows} == {"embedding", "first", "second", "output"}
    assert all(row.passed for row in rows), failed(rows)


def test_one_call_over_all_positions_is_a_call_at_each_position(rng: np.random.Generator) -> None:
    """What "convolutionally" means: the same layer at every position, and no position sees another."""
    params, tokens = drawn(rng), rng.integers(7, size=(3, 6))
    assert params.moe is not None
    result = lstm_moe.forward(params, tokens, CONFIG)
    e = params.embedding.table[tokens]
    y = lstm.forward(params.first, e)[0] + e
    squashed = np.empty_like(y)
    for b in range(3):
        for t in range(6):
            mixed = moe.forward(params.moe, y[b : b + 1, t : t + 1], CONFIG).y
            squashed[b, t] = 1 / (1 + np.exp(-mixed[0, 0]))
    z = y + squashed
    h = z + lstm.forward(params.second, z)[0]
    np.testing.assert_allclose(result.logits, h @ params.output.weight, rtol=1e-12)


def test_a_later_token_does_not_reach_an_earlier_one(rng: np.random.Generator) -> None:
    params = drawn(rng)
    for _ in range(20):
        tokens = rng.integers(7, size=(2, 6))
        changed = tokens.copy()
        changed[:, 4] = (tokens[:, 4] + 1) % 7
        before, after = (lstm_moe.forward(params, one, CONFIG).logits for one in (tokens, changed))
        np.testing.assert_allclose(after[:, :4], before[:, :4], rtol=1e-12)
        assert (abs(after - before)[:, 4:].max(-1) > 1e-9).all()


def test_the_router_counts_every_position_once(rng: np.random.Generator) -> None:
    stats = lstm_moe.forward(drawn(rng), rng.integers(7, size=(3, 6)), CONFIG).stats
    assert stats is not None
    assert (stats.tokens, stats.assignments.sum()) == (18, 36)


def test_gates_are_the_weights_of_each_position(rng: np.random.Generator) -> None:
    params, tokens = drawn(rng), rng.integers(7, size=(3, 6))
    assert params.moe is not None
    cache = lstm_moe.forward(params, tokens, CONFIG).cache
    weights = lstm_moe.gates(cache)
    e = params.embedding.table[tokens]
    logits = (lstm.forward(params.first, e)[0] + e).reshape(18, 4) @ params.moe.router.w_gate
    for row, z in zip(weights, logits, strict=True):
        best = np.argsort(-z)[:2]
        expected = np.zeros(5)
        expected[best] = np.exp(z[best]) / np.exp(z[best]).sum()
        np.testing.assert_allclose(row, expected, rtol=1e-10)


def test_two_lstms_alone_have_no_gates(rng: np.random.Generator) -> None:
    cache = lstm_moe.forward(drawn(rng, mixture=False), rng.integers(7, size=(1, 2)), CONFIG).cache
    with pytest.raises(UserError, match="has no mixture"):
        lstm_moe.gates(cache)


def test_extreme_outputs_of_the_mixture_do_not_overflow(rng: np.random.Generator) -> None:
    params = lstm_moe.init(rng, CONFIG)
    assert params.moe is not None
    params.moe.experts.w_down[...] *= 1e6
    with np.errstate(all="raise", under="ignore"):
        result = lstm_moe.forward(params, rng.integers(7, size=(2, 6)), CONFIG)
        lstm_moe.backward(params, result.cache, result.logits, None)
    assert result.cache.squashed is not None
    assert {0.0, 1.0} <= set(result.cache.squashed.ravel().round(6).tolist())


# The experiment


@pytest.fixture(scope="module")
def fables() -> Prepared:
    return lstm_moe.prepare("fables", context=8)


def test_a_short_run_learns_and_records_the_load(fables: Prepared) -> None:
    setting = Setting("2 of 6", 6, active=2, expert_width=4)
    run = lstm_moe.train(fables, setting, steps=30, width=8, batch=8)
    assert run.loads.shape == (30, 6)
    np.testing.assert_allclose(run.loads.sum(1), 1, rtol=1e-6)
    assert 1 <= run.busiest <= 3
    assert 5 < run.perplexity < 0.6 * fables.tokenizer.vocab_size
    again = lstm_moe.train(fables, setting, steps=30, width=8, batch=8)
    assert again.perplexity == run.perplexity
    other = lstm_moe.train(fables, setting, seed=1, steps=30, width=8, batch=8)
    assert other.perplexity != run.perplexity


def test_without_a_mixture_there_is_no_load(fables: Prepared) -> None:
    run = lstm_moe.train(fables, Setting("none", 0), steps=3, width=8, batch=4)
    assert (run.params.moe, run.loads.shape, run.busiest) == (None, (3, 0), 1.0)


def test_the_balancing_losses_even_the_load(fables: Prepared) -> None:
    with_losses, without = (
        lstm_moe.train(fables, Setting("", 8, 2, 4, coefficients), steps=100, width=8, batch=8).busiest
        for coefficients in (Coefficients(importance=0.1, load=0.1), Coefficients())
    )
    assert with_losses < 1.7 < without


def test_the_busiest_is_relative_to_the_mean_at_the_end() -> None:
    loads = np.full((20, 4), 0.25)
    loads[:18] = [1, 0, 0, 0]
    loads[18:] = [0.5, 0.2, 0.2, 0.1]
    assert lstm_moe.Run(None, CONFIG, 1.0, loads).busiest == pytest.approx(2)  # type: ignore[arg-type]


def test_perplexity_counts_every_whole_sequence_of_the_held_out_text(fables: Prepared) -> None:
    config = ModelConfig(vocab_size=fables.tokenizer.vocab_size, width=8, context=8, experts=1, active_experts=1)
    params = tree.map(np.zeros_like, lstm_moe.init(np.random.default_rng(0), config, False))
    assert lstm_moe.perplexity(params, config, fables) == pytest.approx(fables.tokenizer.vocab_size, rel=1e-6)
    params = lstm_moe.init(np.random.default_rng(0), config, False)
    nats = []
    for document in fables.texts.validation:
        for start in range(0, len(document) - 8, 8):
            logits = lstm_moe.forward(params, document[None, start : start + 8], config).logits[0].astype(float)
            targets = document[start + 1 : start + 9]
            nats += (np.log(np.exp(logits).sum(1)) - logits[np.arange(8), targets]).tolist()
    assert lstm_moe.perplexity(params, config, fables) == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)


def test_more_experts_cost_no_more_per_position() -> None:
    rng = np.random.default_rng(0)
    counts = []
    for experts in (4, 16):
        config = ModelConfig(vocab_size=7, width=8, experts=experts, active_experts=4, expert_width=3)
        counts.append(lstm_moe.active_parameters(lstm_moe.init(rng, config), config))
    lstms = 2 * (8 * 32 + 8 * 32 + 32)
    assert counts[0] == (lstms + 8 * 4 + 4 * 72, lstms + 8 * 4 + 4 * 72)
    assert counts[1] == (lstms + 8 * 16 + 4 * 72, lstms + 8 * 16 + 16 * 72)
    alone = lstm_moe.init(rng, config, mixture=False)
    assert lstm_moe.active_parameters(alone, config) == (lstms, lstms)


def test_more_active_experts_than_experts_are_refused(fables: Prepared) -> None:
    with pytest.raises(UserError, match="4 of 3 experts cannot be active"):
        lstm_moe.train(fables, Setting("", 3))
