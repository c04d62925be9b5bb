"""Linear: y = x W, for any number of axes in front."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minimoe.layers import linear, lora
from minimoe.layers.linear import Linear
from minimoe.proof.gradcheck import check, failed


@given(
    axes=st.lists(st.integers(1, 3), max_size=3),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_gradient_is_right_for_any_shape(axes: list[int], inputs: int, outputs: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    params = linear.init(rng, inputs, outputs)
    assert failed(check("linear", linear.forward, linear.backward, params, rng.standard_normal((*axes, inputs)))) == []


def test_a_product_worked_out_by_hand() -> None:
    params = Linear(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    y, cache = linear.forward(params, np.array([[1.0, 10.0]]))
    dx, grads = linear.backward(params, cache, np.array([[1.0, 0.0, -1.0]]))
    assert y.tolist() == [[41.0, 52.0, 63.0]]
    assert dx.tolist() == [[-2.0, -2.0]]
    assert grads.weight.tolist() == [[1.0, 0.0, -1.0], [10.0, 0.0, -10.0]]


def test_a_fresh_layer_keeps_the_variance_of_its_input(rng: np.random.Generator) -> None:
    y, _ = linear.forward(linear.init(rng, 400, 300), rng.standard_normal((200, 400)))
    assert abs(y.std() - 1) < 0.02
    assert abs(linear.init(rng, 400, 300, std=0.02).weight.std() - 0.02) < 0.001


def test_the_result_has_the_dtype_of_what_is_given(rng: np.random.Generator) -> None:
    params = linear.init(rng, 3, 2)
    y, cache = linear.forward(params, np.ones((4, 3), np.float32))
    dx, grads = linear.backward(params, cache, y)
    assert {y.dtype, dx.dtype, grads.weight.dtype} == {np.dtype(np.float32)}


def test_a_weight_with_an_adapter_computes_what_the_merged_one_does(rng: np.random.Generator) -> None:
    fresh = lora.init(rng, rng.standard_normal((4, 3)), 2, 0.5)
    weight = fresh._replace(b=rng.standard_normal(fresh.b.shape))
    adapted, merged = Linear(weight), Linear(lora.merged(weight))  # type: ignore[arg-type]
    x, dy = rng.standard_normal((2, 5, 4)), rng.standard_normal((2, 5, 3))
    (y, cache), (y_merged, cache_merged) = linear.forward(adapted, x), linear.forward(merged, x)
    np.testing.assert_allclose(y, y_merged, atol=1e-13)
    (dx, grads), (dx_merged, whole) = linear.backward(adapted, cache, dy), linear.backward(merged, cache_merged, dy)
    np.testing.assert_allclose(dx, dx_merged, atol=1e-13)
    np.testing.assert_allclose(grads.weight.a, 0.5 * whole.weight @ weight.b.T, atol=1e-12)  # type: ignore[attr-defined]
    np.testing.assert_allclose(grads.weight.b, 0.5 * weight.a.T @ whole.weight, atol=1e-12)  # type: ignore[attr-defined]
    assert grads.weight.base is None, "a frozen weight has no gradient"
