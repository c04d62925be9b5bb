"""SwiGLU experts: each segment of rows through its own network, and nothing from an expert without rows."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.layers import lora
from minimoe.layers.experts import swiglu
from minimoe.layers.experts.swiglu import Experts
from minimoe.proof.gradcheck import check, failed


def sizes(experts: int, width: int, expert_width: int) -> ModelConfig:
    return ModelConfig(experts=experts, active_experts=1, width=width, expert_width=expert_width)


def drawn(rng: np.random.Generator, experts: int = 3, width: int = 4, expert_width: int = 5) -> Experts:
    return swiglu.init(rng, sizes(experts, width, expert_width), dtype=np.float64)


def one_expert(params: Experts, e: int, x: np.ndarray) -> np.ndarray:
    a = x @ params.w_gate[e]
    return (a / (1 + np.exp(-a)) * (x @ params.w_up[e])) @ params.w_down[e]


def with_counts(counts: list[int]) -> Any:
    def forward(params: Experts, x: np.ndarray) -> tuple[np.ndarray, swiglu.Cache]:
        return swiglu.forward(params, x, counts)

    return forward


@given(
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any),
    behind=st.integers(0, 2),
    width=st.integers(1, 4),
    expert_width=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@example(counts=[1], behind=0, width=1, expert_width=1, seed=0)
@example(counts=[0, 2, 0], behind=1, width=3, expert_width=2, seed=0)
def test_gradient_is_right_with_idle_experts_and_rows_that_belong_to_none(
    counts: list[int], behind: int, width: int, expert_width: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    params = drawn(rng, len(counts), width, expert_width)
    x = rng.standard_normal((sum(counts) + behind, width))
    rows = check("swiglu", with_counts(counts), swiglu.backward, params, x, entries=8, directions=2)
    assert failed(rows) == []


def test_every_segment_goes_through_its_own_expert(rng: np.random.Generator) -> None:
    params, x = drawn(rng), rng.standard_normal((7, 4))
    y, _ = swiglu.forward(params, x, [3, 0, 2])
    np.testing.assert_allclose(y[:3], one_expert(params, 0, x[:3]), atol=1e-14)
    np.testing.assert_allclose(y[3:5], one_expert(params, 2, x[3:5]), atol=1e-14)
    assert (y[5:] == 0).all(), "rows behind the last segment belong to no expert"


def test_an_expert_worked_out_by_hand() -> None:
    params = Experts(*(np.array([[[weight]]]) for weight in (2.0, 3.0, 5.0)))
    y, _ = swiglu.forward(params, np.array([[0.5]]), [1])
    assert abs(y[0, 0] - 1 / (1 + np.exp(-1)) * 1.5 * 5) < 1e-14


def test_an_idle_expert_gets_exactly_zero_gradient(rng: np.random.Generator) -> None:
    params, x = drawn(rng), rng.standard_normal((4, 4))
    y, cache = swiglu.forward(params, x, [1, 0, 3])
    _, grads = swiglu.backward(params, cache, np.ones_like(y))
    for name, gradient in tree.named_leaves(grads):
        assert (gradient[1] == 0).all(), name
        assert (gradient[0] != 0).any(), name


def test_rows_of_no_expert_get_exactly_zero_gradient(rng: np.random.Generator) -> None:
    params, x = drawn(rng), rng.standard_normal((5, 4))
    y, cache = swiglu.forward(params, x, [1, 0, 2])
    dx, _ = swiglu.backward(params, cache, np.ones_like(y))
    assert (dx[3:] == 0).all()


def test_nothing_to_do_at_all_gives_zeros(rng: np.random.Generator) -> None:
    params, x = drawn(rng), rng.standard_normal((2, 4))
    y, cache = swiglu.forward(params, x, [0, 0, 0])
    dx, grads = swiglu.backward(params, cache, np.ones_like(y))
    assert not y.any()
    assert not dx.any()
    assert not any(gradient.any() for gradient in grads)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_inputs_stay_finite(dtype: Any) -> None:
    params = Experts(*(np.ones((1, 1, 1), dtype) for _ in range(3)))
    y, cache = swiglu.forward(params, np.array([[1e4], [-1e4]], dtype), [2])
    dx, grads = swiglu.backward(params, cache, np.ones_like(y))
    assert y.tolist() == [[1e8], [0.0]]  # silu(x)·x is x² far to the right and 0 far to the left
    assert dx.tolist() == [[2e4], [0.0]]
    assert all(np.isfinite(gradient).all() for gradient in grads)
    assert y.dtype == dx.dtype == dtype


def test_the_sigmoid_does_not_overflow() -> None:
    x = np.array([-1e4, -1.0, 0.0, 1.0, 1e4])
    np.testing.assert_allclose(swiglu.sigmoid(x), [0, 1 / (1 + np.e), 0.5, np.e / (1 + np.e), 1], atol=1e-16)


def test_the_spread_of_the_output_weights_can_be_set(rng: np.random.Generator) -> None:
    params = swiglu.init(rng, sizes(2, 100, 200), output_std=0.01)
    assert abs(params.w_down.std() - 0.01) < 3e-4
    assert abs(params.w_gate.std() - 0.1) < 3e-3
    assert params.w_up.dtype == np.float32


# The facts that the rest of the package asks of experts


def test_one_token_through_its_experts_is_the_weighted_sum_of_their_answers(rng: np.random.Generator) -> None:
    params, x = drawn(rng), rng.standard_normal(4)
    before = x.copy()
    y = swiglu.decode(params, x, [2, 0], [0.75, 0.5])
    np.testing.assert_allclose(y, 0.75 * one_expert(params, 2, x) + 0.5 * one_expert(params, 0, x), atol=1e-14)
    assert (x == before).all()


def test_a_blank_has_the_shapes_of_fresh_experts_and_every_weight_is_a_matrix_for_muon(
    rng: np.random.Generator,
) -> None:
    config = sizes(3, 4, 5)
    params, blank = swiglu.init(rng, config), swiglu.blank(config, np.zeros)
    assert [leaf.shape for leaf in blank] == [leaf.shape for leaf in params] == [(3, 4, 5), (3, 4, 5), (3, 5, 4)]
    assert list(tree.marked(params, "matrices")) == list(Experts._fields)


def test_the_active_parameters_are_those_of_the_active_experts() -> None:
    config = ModelConfig(experts=5, active_experts=2, width=4, expert_width=3)
    assert swiglu.active_parameters(config) == 2 * sum(leaf[0].size for leaf in swiglu.blank(config, np.zeros))


@pytest.mark.parametrize("dense", [True, False])
def test_mixtral_s_names_are_views_of_every_weight(rng: np.random.Generator, dense: bool) -> None:
    """Mixtral keeps matrices as outputs × inputs; w1 is the gate, w2 the way down, w3 the way up."""
    params = drawn(rng, 1 if dense else 3)
    named = dict(swiglu.mixtral_tensors(params, dense))
    if dense:
        places = {"mlp.gate_proj": ("w_gate", 0), "mlp.up_proj": ("w_up", 0), "mlp.down_proj": ("w_down", 0)}
    else:
        of = {"w1": "w_gate", "w2": "w_down", "w3": "w_up"}
        places = {f"block_sparse_moe.experts.{e}.{w}": (of[w], e) for e in range(3) for w in of}
    assert named.keys() == {f"{place}.weight" for place in places}
    for place, (field, e) in places.items():
        stack = getattr(params, field)
        assert (named[f"{place}.weight"] == stack[e].T).all()
        assert np.shares_memory(named[f"{place}.weight"], stack)


# With adapters


def adapted(
    rng: np.random.Generator, experts: int = 3, width: int = 4, expert_width: int = 5, rank: int = 2
) -> Experts:
    """Experts each with its own A and B, drawn away from zero."""
    weights = [lora.init(rng, stack, rank, 0.7) for stack in drawn(rng, experts, width, expert_width)]
    return Experts(*(weight._replace(b=rng.standard_normal(weight.b.shape)) for weight in weights))  # type: ignore[arg-type]


@given(
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any),
    behind=st.integers(0, 2),
    expert_width=st.integers(2, 4),
    seed=st.integers(0, 99),
)
def test_experts_with_adapters_compute_what_merged_experts_do(
    counts: list[int], behind: int, expert_width: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    params = adapted(rng, len(counts), 3, expert_width)
    merged: Experts = lora.replace(params, lora.merged)
    x, dy = rng.standard_normal((2, sum(counts) + behind, 3))
    (y, cache), (y_merged, cache_merged) = swiglu.forward(params, x, counts), swiglu.forward(merged, x, counts)
    np.testing.assert_allclose(y, y_merged, atol=1e-12)
    (dx, grads), (dx_merged, whole) = swiglu.backward(params, cache, dy), swiglu.backward(merged, cache_merged, dy)
    np.testing.assert_allclose(dx, dx_merged, atol=1e-11)
    for weight, found, of_stack in zip(params, grads, whole, strict=True):
        assert found.base is None and found.scale is None
        np.testing.assert_allclose(found.a, 0.7 * of_stack @ weight.b.swapaxes(1, 2), atol=1e-10)
        np.testing.assert_allclose(found.b, 0.7 * weight.a.swapaxes(1, 2) @ of_stack, atol=1e-10)
        for e, count in enumerate(counts):
            if count == 0:
                assert not found.a[e].any() and not found.b[e].any(), "an idle expert has learned"


def test_fresh_adapters_change_no_bit_of_the_experts(rng: np.random.Generator) -> None:
    plain = swiglu.init(rng, sizes(3, 8, 6))
    fresh = Experts(*(lora.init(rng, stack, 2, 1.0) for stack in plain))  # type: ignore[arg-type]
    x = rng.standard_normal((50, 8)).astype(np.float32)
    np.testing.assert_array_equal(swiglu.forward(fresh, x, [20, 0, 30])[0], swiglu.forward(plain, x, [20, 0, 30])[0])
