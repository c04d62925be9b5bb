"""LSTM: a recurrent layer whose memory changes only by what its gates let in and out.

    i, f, o = sigmoid,  u = tanh   of the four parts of   x_t W_x + h_{t−1} W_h + b
    c_t = f ⊙ c_{t−1} + i ⊙ u          the cell: keep by the forget gate, add by the input gate
    h_t = o ⊙ tanh(c_t)                what the layer shows of the cell, by the output gate

Every sequence starts with h = c = 0.

Hochreiter and Schmidhuber 1997, Neural Computation 9(8); Gers, Schmidhuber and Cummins 2000, Neural Computation 12(10)
(the forget gate).  Lesson: lessons/63_between_two_lstms.ipynb
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core.arrays import Array, array_module


class LSTM(NamedTuple):
    """The columns of all three arrays are four blocks of D: for i, f, o and u."""

    w_x: Array  # (D_in, 4D)
    w_h: Array  # (D, 4D)
    b: Array  # (4D,)


class Cache(NamedTuple):
    """Time is the first axis, so that the values of one step are contiguous in memory."""

    x: Array  # (T, B, D_in)
    gates: Array  # (T, B, 4D)  i, f, o, u
    cells: Array  # (T, B, D)  c_t
    shown: Array  # (T, B, D)  tanh(c_t)
    h: Array  # (T, B, D)


def init(rng: np.random.Generator, inputs: int, width: int, dtype: DTypeLike = np.float32) -> LSTM:
    """Weights drawn from N(0, 1/inputs) and N(0, 1/width); a forget bias of 1, so that a fresh cell remembers."""
    b = np.zeros(4 * width)
    b[width : 2 * width] = 1
    w_x = rng.standard_normal((inputs, 4 * width)) * inputs**-0.5
    w_h = rng.standard_normal((width, 4 * width)) * width**-0.5
    return LSTM(w_x.astype(dtype), w_h.astype(dtype), b.astype(dtype))


def forward(params: LSTM, x: Array) -> tuple[Array, Cache]:
    """x (B, T, D_in) → h (B, T, D)."""
    xp = array_module(x)
    B, T, D = x.shape[0], x.shape[1], len(params.w_h)
    x = x.swapaxes(0, 1).copy()  # (T, B, D_in)
    # The inputs of all steps are known, so their product is one; only the part with h must go step by step.
    gates = x.reshape(T * B, -1) @ params.w_x
    gates += params.b
    gates = gates.reshape(T, B, 4 * D)
    cells, shown, h = xp.empty((3, T, B, D), x.dtype)
    h_before = c_before = xp.zeros((B, D), x.dtype)
    for t in range(T):
        a = gates[t]
        a += h_before @ params.w_h
        # sigmoid(z) = ½ + ½ tanh(z/2), without overflow: one tanh serves all four parts
        a[:, : 3 * D] *= 0.5
        xp.tanh(a, out=a)
        a[:, : 3 * D] *= 0.5
        a[:, : 3 * D] += 0.5
        i, f, o, u = (a[:, k * D : (k + 1) * D] for k in range(4))
        cells[t] = f * c_before + i * u
        shown[t] = xp.tanh(cells[t])
        h[t] = o * shown[t]
        h_before, c_before = h[t], cells[t]
    y = h.swapaxes(0, 1).copy()  # of one sequence, swapaxes alone is a view: who adds to y would change the cache
    return y, Cache(x, gates, cells, shown, h)


def backward(params: LSTM, cache: Cache, dh: Array) -> tuple[Array, LSTM]:
    """dh (B, T, D) → dx (B, T, D_in) and the gradient of the parameters. From the last step to the first:

        dh_t += da_{t+1} W_hᵀ                       h_t is the output of step t and an input of step t + 1
        dc_t  = dh_t ⊙ o (1 − tanh² c_t) + dc_{t+1} ⊙ f_{t+1}      c_t is also an input of step t + 1
        di = dc ⊙ u,   df = dc ⊙ c_{t−1},   do = dh ⊙ tanh c,   du = dc ⊙ i
        da = each times the slope of its own function: g (1 − g) for i, f and o, and 1 − u² for u

    Then every step adds its part:  dW_x = Σ x_tᵀ da_t,   dW_h = Σ h_{t−1}ᵀ da_t,   db = Σ da_t,   dx_t = da_t W_xᵀ.
    """
    xp = array_module(dh)
    T, B, D = cache.h.shape
    dh = dh.swapaxes(0, 1)  # (T, B, D)
    da = xp.empty_like(cache.gates)
    dh_later = dc_later = xp.zeros((B, D), dh.dtype)  # what step t + 1 asks of h_t and of c_t
    for t in reversed(range(T)):
        i, f, o, u = (cache.gates[t, :, k * D : (k + 1) * D] for k in range(4))
        dh_t = dh[t] + dh_later
        dc = dh_t * o * (1 - xp.square(cache.shown[t])) + dc_later
        a = da[t]
        a[:, :D] = dc * u * i * (1 - i)
        a[:, D : 2 * D] = dc * cache.cells[t - 1] * f * (1 - f) if t else 0  # before the first step the cell is 0
        a[:, 2 * D : 3 * D] = dh_t * cache.shown[t] * o * (1 - o)
        a[:, 3 * D :] = dc * i * (1 - xp.square(u))
        dh_later, dc_later = a @ params.w_h.T, dc * f
    rows = da.reshape(T * B, 4 * D)
    dw_h = cache.h[:-1].reshape(-1, D).T @ da[1:].reshape(-1, 4 * D)  # the first step has no h before it
    dx = (rows @ params.w_x.T).reshape(cache.x.shape)
    dw_x = cache.x.reshape(T * B, -1).T @ rows
    return dx.swapaxes(0, 1).copy(), LSTM(dw_x, dw_h, rows.sum(0))
