"""Soft MoE: both softmaxes, both normalisations, who sees whom, and the gradient along every path."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import soft_moe
from minimoe.layers.experts import swiglu
from minimoe.layers.soft_moe import SoftMoE
from minimoe.proof.gradcheck import check, failed


def sizes(experts: int = 3, width: int = 4) -> ModelConfig:
    return ModelConfig(experts=experts, active_experts=1, width=width, expert_width=5)


def drawn(rng: np.random.Generator, config: ModelConfig, slots_per_expert: int = 2) -> SoftMoE:
    """A scale of about 2, and slots of unequal lengths, so that a forgotten normalisation shows."""
    params = soft_moe.init(rng, config, slots_per_expert, dtype=np.float64)
    slots = params.slots * rng.uniform(0.5, 3, params.slots.shape[1])
    return params._replace(slots=slots, scale=rng.uniform(1.5, 2.5, 1))


def check_soft_moe(params: SoftMoE, x: np.ndarray, config: ModelConfig) -> list[Any]:
    def forward(params: SoftMoE, x: np.ndarray) -> tuple[np.ndarray, soft_moe.Cache]:
        return soft_moe.forward(params, x, config)

    return failed(check("soft_moe", forward, soft_moe.backward, params, x, entries=12, directions=2))


def by_loops(params: SoftMoE, x: np.ndarray, experts: int) -> np.ndarray:
    """One number at a time, with ``math`` only, but for the experts themselves."""
    B, T, D = x.shape
    S = params.slots.shape[1]
    scale = float(params.scale[0])
    y = np.zeros_like(x)

    def length(v: Any) -> float:
        return math.sqrt(sum(float(number) ** 2 for number in v))

    for b in range(B):
        logit = [
            [
                scale
                * sum(x[b, t, d] / length(x[b, t]) * params.slots[d, s] / length(params.slots[:, s]) for d in range(D))
                for s in range(S)
            ]
            for t in range(T)
        ]
        for s in range(S):
            total = sum(math.exp(logit[t][s]) for t in range(T))
            read = sum(math.exp(logit[t][s]) / total * x[b, t] for t in range(T))
            owner = s // (S // experts)
            one = tree.map(lambda leaf, e=owner: leaf[e : e + 1], params.experts)
            answer = swiglu.forward(one, np.array([read]), [1])[0][0]
            for t in range(T):
                y[b, t] += math.exp(logit[t][s]) / sum(math.exp(logit[t][r]) for r in range(S)) * answer
    return y


@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 5),
    experts=st.integers(1, 3),
    slots=st.integers(1, 3),
    width=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
@example(batch=2, tokens=3, experts=2, slots=2, width=4, seed=0)
@example(batch=1, tokens=1, experts=1, slots=1, width=1, seed=0)
def test_every_gradient_is_right(batch: int, tokens: int, experts: int, slots: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    config = sizes(experts, width)
    params = drawn(rng, config, slots)
    assert check_soft_moe(params, rng.standard_normal((batch, tokens, width)), config) == []


def test_it_agrees_with_loops(rng: np.random.Generator) -> None:
    config = sizes()
    params, x = drawn(rng, config), 2 * rng.standard_normal((3, 5, 4))
    y, _ = soft_moe.forward(params, x, config)
    np.testing.assert_allclose(y, by_loops(params, x, 3), atol=1e-5)  # the loops divide by the length without ε


def test_two_tokens_and_two_slots_by_hand() -> None:
    """Tokens along the slots with cosines 1 and 0: at a scale of log 3 every weight is 3/4 or 1/4."""
    config = ModelConfig(experts=2, active_experts=1, width=2, expert_width=1)
    params = SoftMoE(np.eye(2) * 5, np.array([math.log(3)]), swiglu.init(np.random.default_rng(0), config))
    _, cache = soft_moe.forward(params, np.array([[[4.0, 0.0], [0.0, 8.0]]]), config)
    np.testing.assert_allclose(cache.dispatch[0], [[3 / 4, 1 / 4], [1 / 4, 3 / 4]], atol=1e-7)
    np.testing.assert_allclose(cache.combine[0], [[3 / 4, 1 / 4], [1 / 4, 3 / 4]], atol=1e-7)
    np.testing.assert_allclose(cache.experts.x, [[3, 2], [1, 6]], atol=1e-6)  # 3/4 of (4, 0) and 1/4 of (0, 8), ...


@given(seed=st.integers(0, 2**16), tokens=st.integers(1, 6))
def test_dispatch_adds_up_to_one_over_tokens_and_combine_over_slots(seed: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    config = sizes()
    _, cache = soft_moe.forward(drawn(rng, config), rng.standard_normal((2, tokens, 4)), config)
    np.testing.assert_allclose(cache.dispatch.sum(1), 1, rtol=1e-14)
    np.testing.assert_allclose(cache.combine.sum(2), 1, rtol=1e-14)


@given(seed=st.integers(0, 2**16), batch=st.integers(2, 4))
def test_a_sequence_alone_gives_what_it_gives_in_a_batch(seed: int, batch: int) -> None:
    rng = np.random.default_rng(seed)
    config = sizes()
    params, x = drawn(rng, config), rng.standard_normal((batch, 5, 4))
    together, _ = soft_moe.forward(params, x, config)
    for b in range(batch):
        np.testing.assert_allclose(soft_moe.forward(params, x[b : b + 1], config)[0][0], together[b], atol=1e-13)


def test_slots_read_tokens_with_their_lengths_but_choose_them_by_direction(rng: np.random.Generator) -> None:
    config = sizes()
    params, x = drawn(rng, config), rng.standard_normal((2, 5, 4))
    _, plain = soft_moe.forward(params, x, config)
    _, longer = soft_moe.forward(params, 3 * x, config)
    np.testing.assert_allclose(longer.dispatch, plain.dispatch, atol=1e-5)
    np.testing.assert_allclose(longer.combine, plain.combine, atol=1e-5)
    np.testing.assert_allclose(longer.experts.x, 3 * plain.experts.x, rtol=1e-4, atol=1e-5)
    _, other = soft_moe.forward(params._replace(slots=params.slots * 7), x, config)
    np.testing.assert_allclose(other.dispatch, plain.dispatch, atol=1e-5)


def test_every_expert_reads_its_own_slots_of_every_sequence(rng: np.random.Generator) -> None:
    config = sizes(experts=2)
    params, x = drawn(rng, config, slots_per_expert=3), rng.standard_normal((4, 5, 4))
    _, cache = soft_moe.forward(params, x, config)
    assert [rows.stop - rows.start for rows in cache.experts.segments] == [12, 12]
    read = np.einsum("bts,btd->sbd", cache.dispatch, x)
    np.testing.assert_allclose(cache.experts.x, read.reshape(-1, 4), atol=1e-14)
    dy = np.zeros_like(x)
    dy[2] = 1
    _, grads = soft_moe.backward(params, cache, dy)
    assert all(abs(leaf).reshape(2, -1).max(1).min() > 1e-6 for leaf in grads.experts), "both learn from one sequence"


def test_it_looks_ahead(rng: np.random.Generator) -> None:
    """Why it may not stand in a decoder: another last token moves every earlier output, and the gradient says so."""
    config = sizes()
    params, x = drawn(rng, config), rng.standard_normal((1, 6, 4))
    changed = x.copy()
    changed[0, -1] = rng.standard_normal(4)
    y, cache = soft_moe.forward(params, x, config)
    moved = abs(soft_moe.forward(params, changed, config)[0] - y)[0].max(1)
    assert moved[:-1].min() > 1e-3
    dy = np.zeros_like(x)
    dy[0, 0] = 1
    dx, _ = soft_moe.backward(params, cache, dy)
    assert abs(dx[0, -1]).max() > 1e-4


def test_the_order_of_the_tokens_does_not_matter(rng: np.random.Generator) -> None:
    config = sizes()
    params, x, order = drawn(rng, config), rng.standard_normal((2, 6, 4)), rng.permutation(6)
    y, _ = soft_moe.forward(params, x, config)
    np.testing.assert_allclose(soft_moe.forward(params, x[:, order], config)[0], y[:, order], atol=1e-13)


def test_with_one_slot_every_token_takes_the_same_answer(rng: np.random.Generator) -> None:
    config = sizes(experts=1)
    params, x = drawn(rng, config, slots_per_expert=1), rng.standard_normal((2, 5, 4))
    y, cache = soft_moe.forward(params, x, config)
    np.testing.assert_allclose(cache.combine, 1)
    np.testing.assert_allclose(y, np.broadcast_to(y[:, :1], y.shape), atol=1e-14)


def test_a_scale_of_zero_takes_plain_means_and_still_learns_its_scale(rng: np.random.Generator) -> None:
    """The gradient of the scale is a sum of dL times the cosines, not of dL times L over s, which fails here."""
    config = sizes()
    params, x = drawn(rng, config)._replace(scale=np.zeros(1)), rng.standard_normal((2, 5, 4))
    _, cache = soft_moe.forward(params, x, config)
    np.testing.assert_allclose(cache.dispatch, 1 / 5)
    np.testing.assert_allclose(cache.combine, 1 / 6)
    assert check_soft_moe(params, x, config) == []


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zero_tokens_and_zero_slots_stay_finite(rng: np.random.Generator, dtype: Any) -> None:
    """A zero token has logits 0: it is read like a token at right angles, and takes the mean of the answers."""
    config = sizes()
    params = tree.map(lambda leaf: leaf.astype(dtype), drawn(rng, config))
    params.slots[:, 1] = 0
    x = rng.standard_normal((2, 5, 4)).astype(dtype)
    x[0, 2] = 0
    x[1] = 0
    y, cache = soft_moe.forward(params, x, config)
    dx, grads = soft_moe.backward(params, cache, np.ones_like(y))
    assert all(np.isfinite(leaf).all() for leaf in (y, dx, *tree.leaves(grads)))
    np.testing.assert_allclose(cache.combine[0, 2], 1 / 6, rtol=1e-6)
    np.testing.assert_allclose(cache.dispatch[0, :, 1], 1 / 5, rtol=1e-6)
    assert not y[1].any(), "experts answer nothing with nothing"
    assert {leaf.dtype for leaf in (y, dx, *tree.leaves(grads))} == {np.dtype(dtype)}


def test_the_gradient_is_right_even_where_everything_is_short() -> None:
    """ε counts as much as the squared lengths here, so a gradient that forgets it would be wrong."""
    rng = np.random.default_rng(3)
    config = sizes()
    params = drawn(rng, config)._replace(slots=1e-3 * rng.standard_normal((4, 6)))
    _, inv = soft_moe.normalize(params.slots, axis=0)
    assert (inv > 300).all()
    assert check_soft_moe(params, rng.standard_normal((2, 3, 4)), config) == []


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_choose_one_token_and_one_slot(rng: np.random.Generator, scale: float) -> None:
    config = sizes()
    params, x = drawn(rng, config)._replace(scale=np.array([scale])), rng.standard_normal((2, 5, 4))
    with np.errstate(all="raise"):
        y, cache = soft_moe.forward(params, x, config)
        dx, grads = soft_moe.backward(params, cache, np.ones_like(y))
    assert all(np.isfinite(leaf).all() for leaf in (y, dx, *tree.leaves(grads)))
    np.testing.assert_allclose(cache.dispatch.max(1), 1, atol=1e-3)
    best = (np.sign(scale) * cache.cosine).argmax(2)
    np.testing.assert_array_equal(cache.combine.argmax(2), best)


def test_fresh_parameters_have_the_shapes_of_a_blank_and_a_scale_of_one(rng: np.random.Generator) -> None:
    config = sizes()
    params, blank = soft_moe.init(rng, config, 2), soft_moe.blank(config, 2, np.zeros)
    assert [leaf.shape for leaf in tree.leaves(params)] == [leaf.shape for leaf in tree.leaves(blank)]
    assert params.slots.shape == (4, 6)
    assert (params.scale.tolist(), params.scale.dtype) == ([1.0], np.float32)
    assert list(tree.marked(params, "by_expert")) == ["experts.w_gate", "experts.w_up", "experts.w_down"]


def test_impossible_sizes_are_refused_in_a_sentence(rng: np.random.Generator) -> None:
    config = sizes()
    with pytest.raises(UserError, match="slots_per_expert 0 .*at least 1"):
        soft_moe.init(rng, config, 0)
    params = soft_moe.init(rng, config, 1)
    with pytest.raises(UserError, match="0 tokens.*at least 1 token"):
        soft_moe.forward(params, np.zeros((2, 0, 4)), config)
    with pytest.raises(UserError, match="3 slots .* 2 experts: give every expert as many slots"):
        soft_moe.forward(params, np.zeros((1, 2, 4)), sizes(experts=2))


def test_the_gradient_of_a_vector_of_zeros_is_a_thousand_times_that_of_its_direction() -> None:
    x_hat, inv = soft_moe.normalize(np.zeros((1, 2, 3)), axis=2)
    assert not x_hat.any()
    dx_hat = np.arange(6.0).reshape(1, 2, 3)
    np.testing.assert_allclose(soft_moe.normalize_backward(x_hat, inv, dx_hat, axis=2), 1000 * dx_hat)
