"""Linear: a matrix product, the operation that uses most of the parameters of a network.

    y = x W

There is no bias, as in Mixtral. The weight may be frozen and have an adapter: see ``lora``.

Lesson: lessons/02_backprop_by_hand.ipynb
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core.arrays import Array
from minimoe.layers import lora
from minimoe.layers.lora import Adapted


class Linear(NamedTuple):
    weight: Array  # (D_in, D_out); while an adapter is trained, a lora.Adapted of this shape


class Cache(NamedTuple):
    x: Array  # (..., D_in)


def init(
    rng: np.random.Generator, inputs: int, outputs: int, std: float | None = None, dtype: DTypeLike = np.float32
) -> Linear:
    """Weights drawn from N(0, std²). The default std is 1/√inputs, which keeps the variance of x."""
    std = inputs**-0.5 if std is None else std
    return Linear((std * rng.standard_normal((inputs, outputs))).astype(dtype))


def forward(params: Linear, x: Array) -> tuple[Array, Cache]:
    """x (..., D_in) → y (..., D_out)."""
    if isinstance(params.weight, Adapted):
        y, _ = lora.forward(params.weight, x.reshape(-1, x.shape[-1]))
    else:
        y = x.reshape(-1, x.shape[-1]) @ params.weight
    return y.reshape(*x.shape[:-1], -1), Cache(x)


def backward(params: Linear, cache: Cache, dy: Array) -> tuple[Array, Linear]:
    """dy (..., D_out) → dx (..., D_in) and the gradient of the weight.

    y_tj = Σ_i x_ti W_ij, so every token adds the outer product of x_t and dy_t to dW, and Wᵀ carries dy back to x:

        dW = xᵀ dy,    dx = dy Wᵀ
    """
    x_rows = cache.x.reshape(-1, cache.x.shape[-1])  # (N, D_in)
    dy_rows = dy.reshape(-1, dy.shape[-1])  # (N, D_out)
    if isinstance(params.weight, Adapted):
        dx, dweight = lora.backward(params.weight, lora.Cache(x_rows), dy_rows)
        return dx.reshape(cache.x.shape), Linear(dweight)
    dx = dy_rows @ params.weight.T
    return dx.reshape(cache.x.shape), Linear(x_rows.T @ dy_rows)
