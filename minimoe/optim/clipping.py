"""Gradient clipping: scale a gradient down if its global norm is above a limit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from minimoe.core import tree
from minimoe.core.arrays import Array, array_module, underflow_is_right
from minimoe.parallel.group import ALONE, Group


def squared_norm(gradient: Any) -> Any:
    """The sum of the squares of all numbers, as a 0-d float64 array; each leaf is summed in its own dtype first."""
    squares: Iterable[Any] = (array_module(leaf).vdot(leaf, leaf).astype("float64") for leaf in tree.leaves(gradient))
    return sum(squares)


@underflow_is_right
def clip(gradient: Any, limit: float, group: Group = ALONE) -> Array:
    """Scales the gradient in place to a global norm of at most ``limit`` (0: no limit). Returns the unscaled norm.

    In a ``group``, each worker has a part of the gradient, and the norm is that of all parts together.
    """
    squares = group.all_reduce(squared_norm(gradient))
    norm: Array = array_module(squares).sqrt(squares)
    if limit:
        scale = limit / array_module(norm).maximum(norm, limit)
        for leaf in tree.leaves(gradient):
            leaf *= scale.astype(leaf.dtype)
    return norm
