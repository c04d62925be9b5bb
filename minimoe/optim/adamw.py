"""AdamW: divide each entry of a gradient by its own recent size.

Kingma and Ba 2014, arXiv 1412.6980; Loshchilov and Hutter 2017, arXiv 1711.05101 (decoupled weight decay).
Lesson: lessons/11_training.ipynb
"""

from __future__ import annotations

from minimoe.core.arrays import Array, array_module
from minimoe.core.config import TrainConfig

EPSILON = 1e-8


def direction(d: Array, mean: Array, square: Array, recipe: TrainConfig, step: int) -> Array:
    """Gradient d → d̂ / (√ŝ + ε), with d̂ and ŝ the unbiased running means of d and d².

        mean ← β₁ mean + (1 − β₁) d,    square ← β₂ square + (1 − β₂) d²,    x̂ = x / (1 − βᵗ),  t = step + 1

    ``mean`` and ``square`` are updated in place. The plain form is in ``minimoe/reference.py``.
    """
    xp = array_module(d)
    fresh = (1 - recipe.beta1) * d  # the only new array: everything below reuses it
    mean *= recipe.beta1
    mean += fresh
    xp.square(d, out=fresh)
    fresh *= 1 - recipe.beta2
    square *= recipe.beta2
    square += fresh
    size = xp.multiply(square, 1 / (1 - recipe.beta2 ** (step + 1)), out=fresh)
    xp.sqrt(size, out=size)
    size += EPSILON
    size *= 1 - recipe.beta1 ** (step + 1)  # the correction of the mean, moved to the divisor
    return xp.divide(mean, size, out=size)
