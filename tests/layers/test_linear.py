"""Linear: y = x W, for any number of axes in front."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minimoe.layers import linear
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
