"""The mixture: its gradient, its sorting, capacity, and experts nobody chose. What it equals: test_equivalences."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from small_models import EVERY_LOSS, drawn_mixture, mixture, mixtures

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.layers import capacity, moe, routing
from minimoe.layers.experts import swiglu
from minimoe.layers.moe import MoE
from minimoe.losses import balance
from minimoe.proof.gradcheck import Ranked, check, failed

ONE_TOKEN_ONE_EXPERT = {
    "batch": 1,
    "time": 1,
    "experts": 1,
    "active": 1,
    "noisy": True,
    "renormalize": True,
    "capacity_factor": 1.0,
    "seed": 0,
}


def set_up(case: dict[str, Any]) -> tuple[ModelConfig, MoE, np.ndarray, Any]:
    rng = np.random.default_rng(case["seed"])
    config = mixture(case["experts"], min(case["active"], case["experts"]), case["renormalize"], case["noisy"])
    x = rng.standard_normal((case["batch"], case["time"], 4))
    noise = rng.standard_normal((case["batch"], case["time"], case["experts"])) if case["noisy"] else None
    return config, drawn_mixture(rng, config), x, noise


def check_moe(params: MoE, x: np.ndarray, config: ModelConfig, noise: Any, capacity_factor: float | None) -> list[Any]:
    def forward(params: MoE, x: np.ndarray) -> tuple[Any, Any]:
        y, stats, _, cache = moe.forward(params, x, config, noise=noise, capacity_factor=capacity_factor)
        losses, dstats = balance.loss(stats, EVERY_LOSS)
        return (y, balance.weighted(losses, EVERY_LOSS)), (cache, dstats)

    def backward(params: MoE, cache: Any, dy: Any) -> tuple[Any, Any]:
        return moe.backward(params, cache[0], dy[0], tree.map(lambda sum: sum * dy[1], cache[1]))

    def routing(params: MoE, cache: Any) -> list[Ranked]:
        c = cache[0].router
        clean = c.x @ params.router.w_gate
        return [Ranked(clean if c.noise is None else clean + c.noise * c.sigma, config.active_experts)]

    return check("moe", forward, backward, params, x, routing=routing, entries=5, directions=2)


@given(case=mixtures)
@example(case=ONE_TOKEN_ONE_EXPERT)
def test_gradient_is_right_with_idle_experts_and_dropped_tokens(case: dict[str, Any]) -> None:
    config, params, x, noise = set_up(case)
    rows = check_moe(params, x, config, noise, case["capacity_factor"])
    assert all(row.passed or 2 * row.refused > row.refused + row.checked for row in rows), failed(rows)


def test_noise_moves_the_choice_but_never_the_expert_s_input(rng: np.random.Generator) -> None:
    config = mixture()
    params, x, noise = drawn_mixture(rng, config), rng.standard_normal((2, 6, 4)), rng.standard_normal((2, 6, 5))
    y, _, _, cache = moe.forward(params, x, config, noise=noise)
    assert (y != moe.forward(params, x, config)[0]).any()
    assert (cache.experts.x == x.reshape(12, 4)[cache.dispatch.token]).all()


def test_an_expert_that_nobody_chose_gets_exactly_zero_gradient(rng: np.random.Generator) -> None:
    config = mixture(noisy=False)
    params = drawn_mixture(rng, config)
    params.router.w_gate[:] = np.array([0.3, 0.2, 0.1, 0.0, -9.0])
    x = abs(rng.standard_normal((2, 3, 4)))
    y, stats, _, cache = moe.forward(params, x, config)
    dx, grads = moe.backward(params, cache, np.ones_like(y), balance.loss(stats, EVERY_LOSS)[1])
    assert stats.assignments.tolist() == [6, 6, 0, 0, 0]
    assert all((gradient[2:] == 0).all() for gradient in grads.experts)
    assert all(np.isfinite(leaf).all() for leaf in tree.leaves((dx, grads)))
    assert grads.router.w_gate[:, 2].any(), "but the balancing loss pulls tokens towards it"


def test_capacity_serves_each_sequence_first_come_first_served() -> None:
    choices = np.array([[0, 0, 1, 0, 1, 0], [1, 1, 1, 1, 0, 1]])
    kept = capacity.within_capacity(choices, 2, 2)
    assert kept.tolist() == [[True, True, True, False, True, False], [True, True, False, False, True, False]]


def test_capacity_is_the_fair_share_times_the_factor_rounded_up(rng: np.random.Generator) -> None:
    """T 6, K 2, E 5: the fair share is 2.4 tokens."""
    config = mixture(noisy=False)
    params = drawn_mixture(rng, config)
    params.router.w_gate[:] = np.array([2.0, 1.0, 0.0, 0.0, 0.0])  # every token chooses experts 0 and 1
    x = abs(rng.standard_normal((2, 6, 4)))
    for factor, capacity in ((1e-6, 1), (1.0, 3), (1.25, 3), (1.3, 4), (2.5, 6)):
        _, stats, dropped, cache = moe.forward(params, x, config, capacity_factor=factor)
        assert cache.dispatch.counts == [2 * capacity, 2 * capacity, 0, 0, 0]
        assert dropped == 2 * 2 * (6 - capacity)
        assert stats.assignments.tolist() == [12, 12, 0, 0, 0], "the sums count what was wanted, not what was served"


def test_a_dropped_token_gets_nothing_from_that_expert_and_keeps_the_weight_of_the_other(
    rng: np.random.Generator,
) -> None:
    config = mixture(experts=2, active=2, noisy=False)
    params, x = drawn_mixture(rng, config), rng.standard_normal((1, 4, 4))
    y, _, dropped, _ = moe.forward(params, x, config, capacity_factor=0.5)
    whole, _, _, _ = moe.forward(params, x, config)
    assert dropped == 4
    np.testing.assert_allclose(y[0, :2], whole[0, :2], atol=1e-14)
    assert (y[0, 2:] == 0).all()


@pytest.mark.parametrize("padding", ["before", "behind"])
def test_padding_takes_no_place_from_tokens(padding: str, rng: np.random.Generator) -> None:
    """Two sequences of 6 and 4 tokens, alone and in rows of 9."""
    config = mixture()
    params, x, noise = drawn_mixture(rng, config), rng.standard_normal((2, 9, 4)), rng.standard_normal((2, 9, 5))
    places = [np.arange(9)[-length:] if padding == "before" else np.arange(length) for length in (6, 4)]
    mask = np.zeros((2, 9))
    for row, place in enumerate(places):
        mask[row, place] = 1
    y, stats, dropped, _ = moe.forward(params, x, config, noise=noise, capacity_factor=0.6, mask=mask)
    alone = [
        moe.forward(params, x[row, place][None], config, noise=noise[row, place][None], capacity_factor=0.6)
        for row, place in enumerate(places)
    ]
    for row, place in enumerate(places):
        np.testing.assert_allclose(y[row, place], alone[row][0][0], rtol=0, atol=1e-12)
    assert dropped == sum(one[2] for one in alone) > 0
    np.testing.assert_allclose(stats.assignments, sum(one[1].assignments for one in alone))


def test_capacity_gives_the_same_however_a_batch_is_split(rng: np.random.Generator) -> None:
    config = mixture()
    params, x, noise = drawn_mixture(rng, config), rng.standard_normal((4, 6, 4)), rng.standard_normal((4, 6, 5))
    whole, _, dropped, _ = moe.forward(params, x, config, noise=noise, capacity_factor=0.6)
    parts = [moe.forward(params, x[b], config, noise=noise[b], capacity_factor=0.6) for b in np.split(np.arange(4), 2)]
    np.testing.assert_allclose(np.concatenate([part[0] for part in parts]), whole, atol=1e-14)
    assert sum(part[2] for part in parts) == dropped > 0


def test_a_later_token_takes_no_place_from_an_earlier_one(rng: np.random.Generator) -> None:
    config = mixture()
    params, x = drawn_mixture(rng, config), rng.standard_normal((1, 6, 4))
    other = x.copy()
    other[0, 3:] = rng.standard_normal((3, 4))
    before, _, dropped, _ = moe.forward(params, x, config, capacity_factor=0.4)
    after, _, _, _ = moe.forward(params, other, config, capacity_factor=0.4)
    np.testing.assert_allclose(after[:, :3], before[:, :3], atol=1e-14)
    assert dropped > 0


@given(
    entries=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=8),
    keep=st.integers(0, 2**16 - 1),
)
def test_sorting_is_stable_and_can_be_undone(entries: list[tuple[int, int]], keep: int) -> None:
    experts = np.array(entries)
    kept = np.array([bool(keep >> i & 1) for i in range(experts.size)]).reshape(experts.shape)
    dispatch = routing.sort_by_expert(experts, 4, kept)
    flat, flags = experts.reshape(-1), kept.reshape(-1)
    assert dispatch.counts == [int(((flat == e) & flags).sum()) for e in range(4)]
    segments = swiglu.segments_of(dispatch.counts)
    for e, rows in enumerate(segments):
        assert dispatch.order[rows].tolist() == np.flatnonzero((flat == e) & flags).tolist()
    assert sorted(dispatch.order) == list(range(experts.size))
    assert (dispatch.order[dispatch.place.reshape(-1)] == np.arange(experts.size)).all()
    assert (dispatch.token == dispatch.order // 2).all()


def test_backward_leaves_its_arguments_alone(rng: np.random.Generator) -> None:
    config = mixture()
    params, x, dy = drawn_mixture(rng, config), rng.standard_normal((2, 6, 4)), rng.standard_normal((2, 6, 4))
    _, stats, _, cache = moe.forward(params, x, config, noise=rng.standard_normal((2, 6, 5)))
    dstats = balance.loss(stats, EVERY_LOSS)[1]
    once = moe.backward(params, cache, dy, dstats)
    twice = moe.backward(params, cache, dy, dstats)
    assert all((a == b).all() for a, b in zip(tree.leaves(once), tree.leaves(twice), strict=True))


def test_a_layer_follows_the_dtype_of_what_it_is_given(rng: np.random.Generator) -> None:
    config = mixture()
    params = moe.init(rng, config)
    x, noise = rng.standard_normal((1, 3, 4)).astype("f"), rng.standard_normal((1, 3, 5)).astype("f")
    y, stats, _, cache = moe.forward(params, x, config, noise=noise, capacity_factor=1.0)
    dx, grads = moe.backward(params, cache, y, balance.loss(stats, EVERY_LOSS)[1])
    assert {leaf.dtype for leaf in tree.leaves((y, dx, grads))} == {np.dtype(np.float32)}
