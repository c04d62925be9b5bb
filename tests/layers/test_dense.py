"""A dense layer: the SwiGLU of one expert, which every token passes through and no router weighs."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.layers import dense, moe
from minimoe.layers.moe import MoE
from minimoe.proof.gradcheck import check, failed

CONFIG = ModelConfig(
    width=4, layers=3, experts=5, active_experts=2, shared_experts=1, expert_width=3, dense_layers=1, dense_width=7
)


def drawn(rng: np.random.Generator, config: ModelConfig = CONFIG) -> MoE:
    params = dense.init(rng, config, dtype=np.float64)
    return tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), params)


@given(batch=st.integers(1, 3), time=st.integers(1, 4), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_every_token_gets_the_swiglu_by_itself(batch: int, time: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    params = drawn(rng, dataclasses.replace(CONFIG, dense_width=width))
    x = rng.standard_normal((batch, time, 4))
    y, _ = dense.forward(params, x)
    w_gate, w_up, w_down = (stack[0] for stack in params.shared)
    for b, t in np.ndindex(batch, time):
        a = x[b, t] @ w_gate
        np.testing.assert_allclose(y[b, t], (a / (1 + np.exp(-a)) * (x[b, t] @ w_up)) @ w_down, atol=1e-12)


@given(time=st.integers(1, 4), seed=st.integers(0, 99))
def test_gradient_is_right(time: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = check("dense", dense.forward, dense.backward, drawn(rng), rng.standard_normal((2, time, 4)), entries=6)
    assert failed(rows) == []
    assert [row.tensor for row in rows] == ["x", "shared.w_gate", "shared.w_up", "shared.w_down"]


def test_it_is_what_a_mixture_adds_for_its_shared_expert(rng: np.random.Generator) -> None:
    """The same weights as the shared expert of a mixture whose other experts answer nothing."""
    config = dataclasses.replace(CONFIG, shared_experts=1, expert_width=7)
    params = drawn(rng)
    mixture = moe.init(rng, config, dtype=np.float64)._replace(shared=params.shared)
    mixture.experts.w_down[:] = 0
    x = rng.standard_normal((2, 3, 4))
    np.testing.assert_allclose(dense.forward(params, x)[0], moe.forward(mixture, x, config).y, atol=1e-13)


@pytest.mark.parametrize(("dense_width", "expected"), [(None, (2 + 1) * 3), (7, 7)])
def test_its_width_is_its_own_or_that_of_the_experts_of_a_token(
    rng: np.random.Generator, dense_width: int | None, expected: int
) -> None:
    config = dataclasses.replace(CONFIG, dense_width=dense_width)
    fresh, blank = dense.init(rng, config), dense.blank(config, np.zeros)
    assert tree.map(np.shape, fresh) == tree.map(np.shape, blank)
    assert fresh.shared.w_up.shape == (1, 4, expected)


def test_it_has_no_router_and_nothing_that_a_worker_could_own_alone(rng: np.random.Generator) -> None:
    params = drawn(rng)
    assert dense.is_dense(params)
    assert not dense.is_dense(moe.init(rng, CONFIG))
    assert (params.router, params.experts) == (None, None)
    assert list(tree.marked(params, "by_expert")) == []
    assert list(tree.marked(params, "matrices")) == ["shared.w_gate", "shared.w_up", "shared.w_down"]


def test_what_it_writes_starts_as_small_as_asked(rng: np.random.Generator) -> None:
    config = dataclasses.replace(CONFIG, width=64, dense_width=100)
    params: Any = dense.init(rng, config, 0.25).shared
    assert abs(params.w_down.std() - 0.25 * 100**-0.5) < 0.001
    assert abs(params.w_up.std() - 64**-0.5) < 0.003
    assert params.w_up.dtype == np.float32
