"""RoPE: encode the position of a token by rotating its queries and keys.

Channel j of the first half and channel j of the second half form a pair, a point in a plane. At position t the pair
is rotated by the angle t·ω_j, so the product of a query and a key depends on positions only through their distance:

    y₁ = x₁ cos − x₂ sin,    y₂ = x₂ cos + x₁ sin,    ω_j = θ^(−2j/C)

Su et al. 2021, arXiv 2104.09864; pairs are split by halves as in the Hugging Face layout.
Lesson: lessons/04_rope.ipynb
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core.arrays import Array, array_module


class Rotation(NamedTuple):
    """The angles of T positions. They are not parameters, and they are all that ``backward`` needs."""

    cos: Array  # (T, 1, C/2)
    sin: Array  # (T, 1, C/2)


def init(positions: Array, head_width: int, theta: float = 10_000.0, dtype: DTypeLike = np.float32) -> Rotation:
    """The rotation for ``positions`` (T,), integers.

    The angles and their cosines and sines are computed in float64, and then rounded to ``dtype``.
    """
    xp = array_module(positions)
    frequency = theta ** (-2.0 * xp.arange(head_width // 2) / head_width)  # (C/2,)
    angle = positions[:, None, None] * frequency  # (T, 1, C/2)
    return Rotation(xp.cos(angle).astype(dtype), xp.sin(angle).astype(dtype))


def forward(rotation: Rotation, x: Array) -> Array:
    """x (B, T, H, C) → the same shape, with the pairs of each head rotated by the angles of their position."""
    xp = array_module(x)
    heads, half = x.shape[-2], x.shape[-1] // 2
    # Repeated for every channel of every head, so that the products run over long rows and not over C/2 numbers. The
    # plain form, which computes y₁ and y₂ separately, is in ``minimoe/reference.py``.
    cos = xp.concatenate([rotation.cos, rotation.cos], axis=-1).repeat(heads, axis=1)  # (T, H, C)
    sin = xp.concatenate([-rotation.sin, rotation.sin], axis=-1).repeat(heads, axis=1)
    y = xp.empty_like(x)  # first each channel's partner in its pair
    y[..., :half] = x[..., half:]
    y[..., half:] = x[..., :half]
    y *= sin
    y += x * cos
    return y


def backward(rotation: Rotation, dy: Array) -> Array:
    """dy (B, T, H, C) → dx (B, T, H, C).

    A rotation R is orthogonal, so its transpose, which carries gradients back, is the rotation by the opposite angle:

        dx = Rᵀ dy = R(−angle) dy
    """
    return forward(Rotation(rotation.cos, -rotation.sin), dy)
