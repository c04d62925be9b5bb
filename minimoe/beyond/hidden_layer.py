"""A network with one hidden layer of tanh units: what the mixtures of 1991 and 1994 were compared with.

    y = tanh(x W + b) V + c

Lessons: lessons/60_adaptive_mixtures.ipynb, lessons/61_hierarchies_and_em.ipynb
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core.arrays import Array, array_module


class HiddenLayer(NamedTuple):
    w_hidden: Array  # (D, F)
    b_hidden: Array  # (F,)
    w_out: Array  # (F, M)
    b_out: Array  # (M,)


class Cache(NamedTuple):
    x: Array  # (N, D)
    hidden: Array  # (N, F)  after the tanh


def init(
    rng: np.random.Generator, inputs: int, hidden: int, outputs: int, dtype: DTypeLike = np.float64
) -> HiddenLayer:
    """Weights drawn from N(0, 1/rows), so that sums start with a size near 1; no offsets."""
    return HiddenLayer(
        (rng.standard_normal((inputs, hidden)) / np.sqrt(inputs)).astype(dtype),
        np.zeros(hidden, dtype),
        (rng.standard_normal((hidden, outputs)) / np.sqrt(hidden)).astype(dtype),
        np.zeros(outputs, dtype),
    )


def forward(params: HiddenLayer, x: Array) -> tuple[Array, Cache]:
    """x (N, D) → y (N, M)."""
    hidden = array_module(x).tanh(x @ params.w_hidden + params.b_hidden)
    return hidden @ params.w_out + params.b_out, Cache(x, hidden)


def backward(params: HiddenLayer, cache: Cache, dy: Array) -> tuple[Array, HiddenLayer]:
    """dy (N, M) → dx (N, D) and the gradient of the parameters.

    With a the hidden units, tanh′ = 1 − a²:    da = dy Vᵀ,    dz = da (1 − a²),    dW = xᵀ dz,    dx = dz Wᵀ
    """
    dz = dy @ params.w_out.T * (1 - cache.hidden**2)
    gradient = HiddenLayer(cache.x.T @ dz, dz.sum(0), cache.hidden.T @ dy, dy.sum(0))
    return dz @ params.w_hidden.T, gradient
