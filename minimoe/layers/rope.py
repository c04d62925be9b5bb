"""RoPE: tell attention where a token stands by rotating its queries and keys.

Channel j of the first half and channel j of the second half form a pair, a point in a plane. At position t the pair
is turned by the angle t·ω_j, so the product of a query at i and a key at j depends on i − j alone:

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
    """The angles of T positions; it has no parameters, and serves as the cache of its own backward."""

    cos: Array  # (T, 1, C/2)
    sin: Array  # (T, 1, C/2)


def init(positions: Array, head_width: int, theta: float = 10_000.0, dtype: DTypeLike = np.float32) -> Rotation:
    """The rotation of ``positions`` (T,), integers; the angles are taken in float64, then rounded to ``dtype``."""
    xp = array_module(positions)
    frequency = theta ** (-2.0 * xp.arange(head_width // 2) / head_width)  # (C/2,)
    angle = positions[:, None, None] * frequency  # (T, 1, C/2)
    return Rotation(xp.cos(angle).astype(dtype), xp.sin(angle).astype(dtype))


def forward(rotation: Rotation, x: Array) -> Array:
    """x (B, T, H, C) → each head's pairs turned by the angle of their position, same shape."""
    xp = array_module(x)
    heads, half = x.shape[-2], x.shape[-1] // 2
    # laid out for every channel of every head, so that the products run over long rows and not over C/2 numbers
    cos = xp.concatenate([rotation.cos, rotation.cos], axis=-1).repeat(heads, axis=1)  # (T, H, C)
    sin = xp.concatenate([-rotation.sin, rotation.sin], axis=-1).repeat(heads, axis=1)
    y = xp.empty_like(x)
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
