"""A frozen quantised layer: the product with the weight that its codes stand for, dx by finite differences, no dW."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.compression import frozen
from minimoe.compression.quantize import SCHEMES
from minimoe.core.errors import UserError
from minimoe.layers import linear
from minimoe.layers.linear import Linear
from minimoe.proof.gradcheck import check, failed


def weight(inputs: int, outputs: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((inputs, outputs)).astype(np.float32)


@given(
    scheme=st.sampled_from(list(SCHEMES)), inputs=st.integers(1, 6), outputs=st.integers(1, 6), seed=st.integers(0, 9)
)
def test_dx_is_right_and_there_is_no_gradient_of_the_weight(scheme: str, inputs: int, outputs: int, seed: int) -> None:
    layer = frozen.quantize(weight(inputs, outputs, seed), scheme)

    def forward(params: None, x: Any) -> tuple[Any, Any]:
        return frozen.forward(layer, x)

    def backward(params: None, cache: Any, dy: Any) -> tuple[Any, None]:
        dx, dparams = frozen.backward(layer, cache, dy)
        assert dparams is None
        return dx, None

    x = np.random.default_rng(seed + 1).standard_normal((2, 3, inputs))
    assert failed(check("frozen", forward, backward, None, x)) == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_the_linear_layer_of_the_dequantised_weight(scheme: str) -> None:
    of, w = SCHEMES[scheme], weight(7, 5)
    plain = Linear(of.module.dequantize(of.module.quantize(w, **of.settings)))
    rng = np.random.default_rng(1)
    x, dy = rng.standard_normal((2, 3, 7)).astype(np.float32), rng.standard_normal((2, 3, 5)).astype(np.float32)
    layer = frozen.quantize(w, scheme)
    y, cache = frozen.forward(layer, x)
    expected, of_linear = linear.forward(plain, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        frozen.backward(layer, cache, dy)[0], linear.backward(plain, of_linear, dy)[0], rtol=1e-5, atol=1e-5
    )
    assert np.abs(y - x @ w).max() > 1e-4, "the weight was not quantised"


def test_nothing_is_kept_between_the_passes_and_the_dtype_is_that_of_x() -> None:
    layer = frozen.quantize(weight(7, 5), "nf4")
    for dtype in (np.float32, np.float64):
        y, cache = frozen.forward(layer, np.ones((4, 7), dtype))
        assert cache is None
        assert y.dtype == frozen.backward(layer, None, y)[0].dtype == dtype


def test_the_weights_in_memory_are_codes() -> None:
    layer = frozen.quantize(weight(64, 64), "nf4")
    held = sum(leaf.nbytes for leaf in layer.quantized if isinstance(leaf, np.ndarray))
    assert held < 64 * 64 * 4 / 7


def test_a_scheme_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="no scheme 'nf5' .did you mean 'nf4'"):
        frozen.quantize(weight(2, 2), "nf5")
    with pytest.raises(UserError, match="type float64 cannot be quantised"):
        frozen.quantize(np.ones((2, 2)), "nf4")
