"""RMSNorm: scale every token to a root mean square of 1, then multiply each channel by a learned gain.

    y = gain · x / rms(x),    rms(x) = √(mean(x²) + ε)

Zhang and Sennrich 2019, arXiv 1910.07467.  Lesson: lessons/03_rmsnorm.ipynb
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core.arrays import Array, array_module


class RMSNorm(NamedTuple):
    gain: Array  # (D,)


class Cache(NamedTuple):
    x_hat: Array  # (..., D)  x / rms(x)
    inv_rms: Array  # (..., 1)


def init(width: int, dtype: DTypeLike = np.float32) -> RMSNorm:
    """A gain of one for every channel."""
    return RMSNorm(np.ones(width, dtype))


def forward(params: RMSNorm, x: Array, eps: float = 1e-5) -> tuple[Array, Cache]:
    """x (..., D) → y (..., D)."""
    xp = array_module(x)
    inv_rms = 1 / xp.sqrt(_dot(x, x) / x.shape[-1] + eps)
    x_hat = x * inv_rms
    return params.gain * x_hat, Cache(x_hat, inv_rms)


def backward(params: RMSNorm, cache: Cache, dy: Array) -> tuple[Array, RMSNorm]:
    """dy (..., D) → dx (..., D) and the gradient of the gain.

    x̂ = r·x depends on x twice, directly and through r = 1/rms(x), with ∂r/∂x = −r³ x / D, so

        dx = r · (dx̂ − x̂ · mean(x̂ ⊙ dx̂)),   dx̂ = gain ⊙ dy
        dgain = Σ_t dy_t ⊙ x̂_t
    """
    xp = array_module(dy)
    x_hat, inv_rms = cache
    width = dy.shape[-1]
    dgain = xp.einsum("td,td->d", dy.reshape(-1, width), x_hat.reshape(-1, width))
    dx = params.gain * dy  # dx̂
    dx -= x_hat * (_dot(x_hat, dx) / width)
    dx *= inv_rms
    return dx, RMSNorm(dgain)


def _dot(a: Array, b: Array) -> Array:
    """The inner product of each row of a with the same row of b, (..., D) → (..., 1), without storing the products."""
    return array_module(a).einsum("...d,...d->...", a, b)[..., None]
