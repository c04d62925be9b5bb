"""RMSNorm: unit root-mean-square, one gain a channel."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minimoe.layers import rmsnorm
from minimoe.layers.rmsnorm import RMSNorm
from minimoe.proof.gradcheck import check, failed


@given(
    axes=st.lists(st.integers(1, 3), max_size=3),
    width=st.integers(1, 6),
    scale=st.sampled_from([0.01, 1.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_gradient_is_right_for_any_shape_and_scale(axes: list[int], width: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = scale * rng.standard_normal((*axes, width))
    params = RMSNorm(rng.standard_normal(width))

    def forward(params: RMSNorm, x: np.ndarray) -> tuple[np.ndarray, rmsnorm.Cache]:
        return rmsnorm.forward(params, x, eps=1e-2)

    assert failed(check("rmsnorm", forward, rmsnorm.backward, params, x)) == []


def test_every_token_gets_unit_root_mean_square_and_then_the_gain(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 3, 8)) * np.array([1e-2, 1.0, 1e4])[:, None]
    y, _ = rmsnorm.forward(rmsnorm.init(8, np.float64), x, eps=0.0)
    np.testing.assert_allclose(np.sqrt((y * y).mean(-1)), 1, rtol=1e-14)
    gain = rng.standard_normal(8)
    np.testing.assert_allclose(rmsnorm.forward(RMSNorm(gain), x, eps=0.0)[0], gain * y, rtol=1e-14)


def test_a_norm_worked_out_by_hand() -> None:
    y, _ = rmsnorm.forward(RMSNorm(np.array([1.0, 10.0])), np.array([[1.0, 7.0]]), eps=0.0)
    np.testing.assert_allclose(y, [[0.2, 14.0]], rtol=1e-15)  # rms of 1 and 7 is 5


def test_no_gradient_flows_along_x_itself_because_its_length_does_not_count(rng: np.random.Generator) -> None:
    x, dy = rng.standard_normal((2, 5, 8))
    params = RMSNorm(rng.standard_normal(8))
    _, cache = rmsnorm.forward(params, x, eps=0.0)
    dx, _ = rmsnorm.backward(params, cache, dy)
    np.testing.assert_allclose((x * dx).sum(-1), 0, atol=1e-14)


def test_a_token_of_zeros_stays_finite_both_ways() -> None:
    params = rmsnorm.init(4)
    y, cache = rmsnorm.forward(params, np.zeros((1, 4), np.float32))
    dx, grads = rmsnorm.backward(params, cache, np.ones((1, 4), np.float32))
    assert (y == 0).all()
    assert np.isfinite(dx).all()
    assert (grads.gain == 0).all()
