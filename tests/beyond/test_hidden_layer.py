"""The network with one hidden layer: a loop, its gradient, and how it starts."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.beyond import hidden_layer
from minimoe.core import tree
from minimoe.proof.finite_differences import check
from minimoe.proof.results import failed


@given(sizes=st.tuples(*[st.integers(1, 4)] * 4), seed=st.integers(0, 2**16))
def test_every_gradient_is_right(sizes: tuple[int, int, int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    cases, inputs, hidden, outputs = sizes
    params = hidden_layer.init(rng, inputs, hidden, outputs)
    params = tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), params)
    x = rng.standard_normal((cases, inputs))
    rows = check("network", hidden_layer.forward, hidden_layer.backward, params, x, entries=6, directions=2)
    assert not failed(rows), failed(rows)


def test_it_agrees_with_a_loop(rng: np.random.Generator) -> None:
    params, x = hidden_layer.init(rng, 3, 4, 2), rng.standard_normal((5, 3))
    params = params._replace(b_hidden=rng.standard_normal(4), b_out=rng.standard_normal(2))
    y, _ = hidden_layer.forward(params, x)
    for n, m in np.ndindex(5, 2):
        units = [math.tanh(x[n] @ params.w_hidden[:, f] + params.b_hidden[f]) for f in range(4)]
        assert y[n, m] == pytest.approx(sum(units[f] * params.w_out[f, m] for f in range(4)) + params.b_out[m])


def test_it_starts_with_sums_near_one_and_no_offsets(rng: np.random.Generator) -> None:
    params = hidden_layer.init(rng, 300, 200, 100)
    assert params.w_hidden.std() == pytest.approx(300**-0.5, rel=0.02)
    assert params.w_out.std() == pytest.approx(200**-0.5, rel=0.02)
    assert not params.b_hidden.any()
    assert not params.b_out.any()
