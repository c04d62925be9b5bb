"""Expert choice against a loop over experts, its gradient on every path, its equal load, and its look ahead."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import decoder, moe
from minimoe.layers.mode import Mode
from minimoe.layers.routers import expert_choice
from minimoe.layers.routers.expert_choice import ExpertChoice
from minimoe.layers.routing import RouterStats, by_token, experts_by_token
from minimoe.losses import balance
from minimoe.losses.balance import Coefficients
from minimoe.proof.gradcheck import Ranked, check, failed

EVERY_LOSS = Coefficients(balance=0.5, importance=0.3, load=0.4, z=0.2, sequence=0.6)
CONFIG = ModelConfig(width=4, experts=5, active_experts=2, expert_width=3, router="expert_choice")


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
    params, x = ExpertChoice(rng.standard_normal((4, experts))), rng.standard_normal((batch, context, 4))
    mask = (rng.random((batch, context)) < 0.7).astype(float) if masked else None
    mode = Mode(True, None, factor, balance_by_sequence=True, mask=mask)

    def forward(params: ExpertChoice, x: np.ndarray) -> tuple[Any, Any]:
        routing, stats, cache = expert_choice.forward(params, x, config, mode)
        losses, dstats = balance.loss(stats, EVERY_LOSS)
        return (routing.weight, balance.weighted(losses, EVERY_LOSS)), (cache, dstats)

    def backward(params: ExpertChoice, cache: Any, dy: Any) -> tuple[Any, Any]:
        return expert_choice.backward(params, cache[0], dy[0], tree.map(lambda leaf: leaf * dy[1], cache[1]))

    def compared(params: ExpertChoice, cache: Any) -> list[Ranked]:
        return [Ranked(*pair) for pair in expert_choice.compared(params, cache[0])]

    rows = check("expert_choice", forward, backward, params, x, routing=compared, entries=10, directions=2)
    assert all(row.passed or 2 * row.refused > row.refused + row.checked for row in rows), failed(rows)


@pytest.mark.parametrize("factor", [None, 0.6])
def test_it_agrees_with_a_loop_over_sequences_and_experts(factor: float | None, rng: np.random.Generator) -> None:
    params, x = ExpertChoice(rng.standard_normal((4, 5))), rng.standard_normal((3, 7, 4))
    mask = np.ones((3, 7))
    mask[1, 4:] = mask[2, :2] = 0
    routing, stats, _ = expert_choice.forward(params, x, CONFIG, Mode(True, None, factor, mask=mask))
    z = x @ params.w_gate
    p = np.exp(z) / np.exp(z).sum(2, keepdims=True)
    weights = np.zeros((3, 7, 5))
    counts = np.zeros(5, int)
    for b in range(3):
        real = [t for t in range(7) if mask[b, t]]
        c = math.ceil((factor or 1) * 2 * len(real) / 5)
        for e in range(5):
            for t in sorted(real, key=lambda t: -p[b, t, e])[:c]:
                weights[b, t, e] = p[b, t, e]
                counts[e] += 1
    assert routing.counts == counts.tolist()
    found = np.zeros((21, 6))
    experts = experts_by_token(routing)
    np.put_along_axis(found, experts, by_token(routing.weight, routing.place), axis=1)  # column −1 for none
    np.testing.assert_allclose(found[:, :5], weights.reshape(21, 5), rtol=1e-12)
    for row, weight in zip(experts, by_token(routing.weight, routing.place), strict=True):
        assert list(row >= 0) == sorted(row >= 0, reverse=True)
        assert list(weight) == sorted(weight, reverse=True), "the best comes first"
    present = mask[:, :, None]
    expected = RouterStats(
        tokens=mask.sum(),
        assignments=counts,
        probability=(p * present).sum((0, 1)),
        importance=weights.sum((0, 1)),
        load=counts,
        squared_lse=(np.log(np.exp(z).sum(2)) ** 2 * mask).sum(),
        by_sequence=np.zeros(()),
        entropy=-(p * np.log(p) * present).sum(),
    )
    for name, mine, theirs in zip(RouterStats._fields, stats, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    ("context", "factor", "taken"), [(5, None, 2), (6, None, 3), (5, 0.1, 1), (5, 2.0, 4), (5, 9.0, 5)]
)
def test_every_expert_takes_equally_many_tokens_of_every_sequence(
    context: int, factor: float | None, taken: int, rng: np.random.Generator
) -> None:
    """⌈factor · 2 · T / 5⌉, and no more than there are."""
    params, x = ExpertChoice(rng.standard_normal((4, 5))), rng.standard_normal((3, context, 4))
    routing, _, _ = expert_choice.forward(params, x, CONFIG, Mode(capacity_factor=factor))
    assert routing.counts == [3 * taken] * 5
    for e in range(5):
        start = 3 * taken * e
        of_sequence = routing.token[start : start + 3 * taken] // context
        assert np.bincount(of_sequence).tolist() == [taken] * 3


def test_the_earliest_token_wins_a_tie() -> None:
    routing, _, _ = expert_choice.forward(ExpertChoice(np.zeros((4, 5))), np.ones((2, 5, 4)), CONFIG)
    assert routing.token.tolist() == [0, 1, 5, 6] * 5


def test_padding_is_never_taken_however_well_it_suits() -> None:
    """Nor where every p underflows to 0, so that a token and padding look alike."""
    config = dataclasses.replace(CONFIG, experts=2, active_experts=1)
    x = np.full((1, 6, 4), 1e4)
    x[0, 2] = -1e4  # padding, which expert 1 would love
    mask = np.array([[1, 1, 0, 1, 1, 0]])
    params = ExpertChoice(np.array([[1.0, 0]] * 4))
    routing, _, _ = expert_choice.forward(params, x, config, Mode(mask=mask))
    assert routing.token.tolist() == [0, 1] * 2
    routing, _, _ = expert_choice.forward(params, x, config, Mode(capacity_factor=100.0, mask=mask))
    assert routing.token.tolist() == [0, 1, 3, 4] * 2


def test_a_sequence_is_treated_alike_whatever_is_in_the_batch(rng: np.random.Generator) -> None:
    params = moe.init(rng, CONFIG, dtype=np.float64)
    params.router.w_gate[...] = rng.standard_normal((4, 5))
    x = rng.standard_normal((4, 7, 4))
    together = moe.forward(params, x, CONFIG).y
    for b in range(4):
        np.testing.assert_allclose(moe.forward(params, x[b : b + 1], CONFIG).y[0], together[b], atol=1e-12)


def test_renaming_the_experts_changes_nothing(rng: np.random.Generator) -> None:
    params, x = moe.init(rng, CONFIG, dtype=np.float64), rng.standard_normal((2, 7, 4))
    order = rng.permutation(5)
    renamed = moe.MoE(ExpertChoice(params.router.w_gate[:, order]), tree.map(lambda leaf: leaf[order], params.experts))
    one, other = moe.forward(params, x, CONFIG), moe.forward(renamed, x, CONFIG)
    np.testing.assert_allclose(one.y, other.y, atol=1e-12)
    np.testing.assert_allclose(one.stats.importance[order], other.stats.importance)


def test_a_better_token_at_the_end_takes_the_place_of_an_earlier_one() -> None:
    """One expert of two, half of the tokens each: with [3, 2, 1, 0] it takes the first two, with [3, 2, 1, 9] not."""
    config = dataclasses.replace(CONFIG, width=2, experts=2, active_experts=1)
    params = ExpertChoice(np.array([[1.0, 0], [0, 0]]))
    x = np.zeros((1, 4, 2))
    x[0, :, 0] = [3, 2, 1, 0]
    assert expert_choice.forward(params, x, config)[0].token[:2].tolist() == [0, 1]
    x[0, 3, 0] = 9
    assert expert_choice.forward(params, x, config)[0].token[:2].tolist() == [0, 3]
    with pytest.raises(UserError, match="'expert_choice' looks at later tokens"):
        decoder.check(config)


def test_a_token_that_no_expert_takes_passes_the_layer_as_zero(rng: np.random.Generator) -> None:
    config = dataclasses.replace(CONFIG, active_experts=1)
    params, x = moe.init(rng, config, dtype=np.float64), rng.standard_normal((1, 20, 4))
    y, stats, dropped, cache = moe.forward(params, x, config)
    taken = np.bincount(cache.routing.token, minlength=20)
    assert sorted(set(taken.tolist()))[0] == 0 < 1 < taken.max()
    assert [bool(row.any()) for row in y[0]] == (taken > 0).tolist()
    assert (stats.assignments.tolist(), dropped) == ([4] * 5, 0)


def test_every_logit_of_a_taken_token_learns_from_its_weight(rng: np.random.Generator) -> None:
    params, x = ExpertChoice(rng.standard_normal((4, 5))), rng.standard_normal((1, 1, 4))
    config = dataclasses.replace(CONFIG, active_experts=1)
    routing, _, cache = expert_choice.forward(params, x, config)
    one = np.zeros(len(routing.weight))
    one[0] = 1
    _, grads = expert_choice.backward(params, cache, one, None)
    assert (abs(grads.w_gate).sum(0) > 1e-6).all()
