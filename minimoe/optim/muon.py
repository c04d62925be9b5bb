"""Muon: replace the averaged gradient of a matrix by the nearest (semi-)orthogonal matrix.

Every direction in the matrix is then learned equally fast.

Jordan 2024, kellerjordan.github.io/posts/muon, and Liu et al. 2025, arXiv 2502.16982 (the method and its scale); Amsel
et al. 2025, arXiv 2505.16932 (the polynomials).  Lesson: lessons/11_training.ipynb
"""

from __future__ import annotations

import math

import numpy as np

from minimoe.core.arrays import Array, array_module
from minimoe.core.config import TrainConfig

POLYNOMIALS = (
    (8.2987, -24.4305, 18.0903),
    (3.9152, -2.9211, 0.5592),
    (3.1746, -2.3804, 0.4978),
    (2.1895, -1.5672, 0.4079),
    (1.8750, -1.2500, 0.3750),
)
"""(a, b, c) of each step a s + b s³ + c s⁵. Together the steps bring singular values s in [0.005, 1] closest to 1.

Each polynomial is the best one for the interval that the step before it leaves: the first for [0.005, 1], which becomes
[0.04, 1.96], then [0.16, 1.84], [0.50, 1.50], [0.92, 1.08]. Later steps repeat the last one, whose limit is exactly 1.
"""


def direction(d: Array, mean: Array, recipe: TrainConfig) -> Array:
    """Gradient d (..., rows, columns) → 0.2·√max(rows, columns) times an orthogonal matrix.

        mean ← μ mean + (1 − μ) d,    ahead = μ mean + (1 − μ) d

    ``mean`` is updated in place. ``ahead`` looks one step further (Nesterov) and is the matrix that is orthogonalised.
    The factor gives the direction a root mean square of about 0.2, near that of AdamW's direction on noise, 0.23. So
    learning rates of the same order suit both; in lesson 11, the best ones of Muon are two to four times AdamW's.
    """
    fresh = (1 - recipe.momentum) * d
    mean *= recipe.momentum
    mean += fresh
    fresh += recipe.momentum * mean
    orthogonal = orthogonalize(fresh, recipe.newton_schulz_steps)
    orthogonal *= 0.2 * math.sqrt(max(d.shape[-2:]))
    return orthogonal


def orthogonalize(m: Array, steps: int = 3) -> Array:
    """m (..., rows, columns) → close to U Vᵀ, where m = U S Vᵀ, by Newton–Schulz steps; shape and dtype are kept.

    With X = m/‖m‖, each step X ← (a + b X Xᵀ + c (X Xᵀ)²) X keeps U and V and replaces every singular value s by the
    odd polynomial a s + b s³ + c s⁵. ``POLYNOMIALS`` bring s from [0.005, 1] to 1 ± 0.50 in three steps, ± 0.08 in
    four, ± 0.002 in five; smaller s grow by a factor of up to 103, 226, 423. Zero stays zero.
    """
    xp = array_module(m)
    wide = m.shape[-2] <= m.shape[-1]
    x = m if wide else m.swapaxes(-1, -2)  # so that the products X Xᵀ are as small as possible
    norm = xp.sqrt(xp.einsum("...rc,...rc->...", x, x))[..., None, None]
    x = x / xp.maximum(norm, np.finfo(m.dtype).tiny ** 0.5)  # squares of smaller numbers underflow
    identity = xp.eye(x.shape[-2], dtype=m.dtype)
    for step in range(steps):
        a, b, c = POLYNOMIALS[min(step, len(POLYNOMIALS) - 1)]
        gram = x @ x.swapaxes(-1, -2)
        polynomial = gram @ gram
        polynomial *= c
        gram *= b
        polynomial += gram
        polynomial += a * identity
        x = polynomial @ x
    return x if wide else x.swapaxes(-1, -2)
