"""The LSTM: against a loop over single numbers, its gradient through time, and what its gates can do."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.beyond import lstm
from minimoe.beyond.lstm import LSTM
from minimoe.core import tree
from minimoe.proof.gradcheck import check, failed


def drawn(rng: np.random.Generator, inputs: int, width: int) -> LSTM:
    params = lstm.init(rng, inputs, width, np.float64)
    return tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), params)


@given(
    batch=st.integers(1, 3),
    context=st.integers(1, 5),
    inputs=st.integers(1, 4),
    width=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_every_gradient_is_right(batch: int, context: int, inputs: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    params, x = drawn(rng, inputs, width), rng.standard_normal((batch, context, inputs))
    rows = check("lstm", lstm.forward, lstm.backward, params, x, entries=8, directions=2)
    assert all(row.passed for row in rows), failed(rows)


def test_it_agrees_with_a_loop_over_single_numbers(rng: np.random.Generator) -> None:
    params, x = drawn(rng, 3, 2), rng.standard_normal((2, 4, 3))
    y, _ = lstm.forward(params, x)

    def part(k: int, d: int, row: np.ndarray, h: list[float]) -> float:
        column = 2 * k + d
        inputs = sum(row[n] * params.w_x[n, column] for n in range(3))
        return inputs + sum(h[n] * params.w_h[n, column] for n in range(2)) + params.b[column]

    def sigmoid(z: float) -> float:
        return 1 / (1 + math.exp(-z))

    for b in range(2):
        h, c = [0.0, 0.0], [0.0, 0.0]
        for t in range(4):
            before = list(h)
            for d in range(2):
                i, f, o = (sigmoid(part(k, d, x[b, t], before)) for k in range(3))
                c[d] = f * c[d] + i * math.tanh(part(3, d, x[b, t], before))
                h[d] = o * math.tanh(c[d])
            np.testing.assert_allclose(y[b, t], h, rtol=1e-12)


def test_a_later_step_does_not_reach_an_earlier_one(rng: np.random.Generator) -> None:
    params, x = drawn(rng, 3, 4), rng.standard_normal((2, 6, 3))
    y, _ = lstm.forward(params, x)
    changed = x.copy()
    changed[:, 4] += 1
    after, _ = lstm.forward(params, changed)
    np.testing.assert_array_equal(after[:, :4], y[:, :4])
    assert (abs(after - y)[:, 4:] > 1e-6).all()


def test_a_sequence_does_not_depend_on_the_others_of_its_batch(rng: np.random.Generator) -> None:
    params, x = drawn(rng, 3, 4), rng.standard_normal((5, 6, 3))
    y, _ = lstm.forward(params, x)
    for b in range(5):
        np.testing.assert_allclose(lstm.forward(params, x[b : b + 1])[0][0], y[b], rtol=1e-12)


def test_an_open_forget_gate_and_a_closed_input_gate_keep_the_cell_for_ever() -> None:
    """The path that gave the LSTM its name: a gradient comes back through 200 steps undiminished."""
    b = np.array([-1e4, 1e4, 1e4, 0.0])  # i = 0, f = 1, o = 1
    w_x = np.array([[1e4 + 5.0, 0, 0, 3.0]])  # x = 1 opens the input gate
    params = LSTM(w_x, np.zeros((1, 4)), b)
    x = np.zeros((1, 200, 1))
    x[0, 0] = 1
    y, cache = lstm.forward(params, x)
    written = math.tanh(3.0) / (1 + math.exp(-5.0))
    np.testing.assert_allclose(y[0, :, 0], math.tanh(written), rtol=1e-12)
    dy = np.zeros_like(y)
    dy[0, -1] = 1
    dx, _ = lstm.backward(params, cache, dy)
    slope = (1 - math.tanh(written) ** 2) / (1 + math.exp(-5.0)) * (1 - math.tanh(3.0) ** 2) * 3.0
    slope += (1 - math.tanh(written) ** 2) * math.tanh(3.0) * (1e4 + 5) * math.exp(-5.0) / (1 + math.exp(-5.0)) ** 2
    assert dx[0, 0, 0] == pytest.approx(slope, rel=1e-9)
    assert not dx[0, 1:].any()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_inputs_saturate_and_do_not_overflow(size: float, rng: np.random.Generator) -> None:
    params = lstm.init(rng, 3, 4)
    with np.errstate(all="raise", under="ignore"):
        y, cache = lstm.forward(params, np.full((2, 5, 3), size, np.float32))
        dx, grads = lstm.backward(params, cache, np.ones_like(y))
    assert (abs(y) <= 1).all()
    assert all(np.isfinite(leaf).all() for leaf in [dx, *tree.leaves(grads)])


@pytest.mark.parametrize(("batch", "context"), [(1, 4), (4, 1), (2, 3)])
def test_who_adds_to_the_output_does_not_change_the_gradient(
    batch: int, context: int, rng: np.random.Generator
) -> None:
    """A residual connection adds in place. The output must not be a view of what the backward pass needs."""
    params, x = drawn(rng, 3, 2), rng.standard_normal((batch, context, 3))
    y, cache = lstm.forward(params, x)
    dy = rng.standard_normal(y.shape)
    before = lstm.backward(params, cache, dy)
    y += 100
    x += 100
    for old, new in zip(tree.leaves(before), tree.leaves(lstm.backward(params, cache, dy)), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_fresh_cell_remembers_and_has_the_variance_of_its_inputs(rng: np.random.Generator) -> None:
    params = lstm.init(rng, 60, 50)
    np.testing.assert_array_equal(params.b, np.repeat([0, 1, 0, 0], 50))
    assert params.w_x.std() == pytest.approx(60**-0.5, rel=0.05)
    assert params.w_h.std() == pytest.approx(50**-0.5, rel=0.05)
    assert {leaf.dtype for leaf in params} == {np.dtype(np.float32)}
    y, cache = lstm.forward(params, np.ones((2, 3, 60), np.float32))
    dx, grads = lstm.backward(params, cache, y)
    assert {leaf.dtype for leaf in (y, dx, *grads)} == {np.dtype(np.float32)}
