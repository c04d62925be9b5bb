"""The optimiser's step: AdamW for most parameters, Muon for the matrices of attention and experts.

Muon takes the matrices that the components list as ``matrices``; embedding, output layer, routers and norms are
AdamW's. What the optimiser remembers of a parameter tells which of the two updates it: only AdamW keeps a mean square.

Lesson: lessons/11_training.ipynb
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from minimoe.core import tree
from minimoe.core.arrays import Array
from minimoe.core.config import TrainConfig
from minimoe.optim import adamw, muon
from minimoe.optim.schedule import learning_rate

PIECE = 2**17
"""Numbers of a stack that are updated at a time: with all that belongs to them they fit a core's cache."""


class Moments(NamedTuple):
    """What the optimiser remembers of one parameter."""

    mean: Array  # running mean of the gradient
    square: Array | None  # running mean of its square; None for a matrix of Muon's


State = dict[str, Moments]
"""The optimiser's memory, by the name of the parameter."""


def init(params: Any, recipe: TrainConfig) -> State:
    """An optimiser that has seen nothing, for a tree of parameters."""
    by_muon = set(tree.marked(params, "matrices")) if recipe.optimizer == "muon" else set()
    return {
        name: Moments(tree.zeros_like(leaf), None if name in by_muon else tree.zeros_like(leaf))
        for name, leaf in tree.named_leaves(params)
    }


def update(params: Any, gradient: Any, state: State, recipe: TrainConfig, step: int) -> None:
    """Takes step number ``step`` (from 0): changes ``params`` and ``state`` in place.

    Weight decay is decoupled from the gradient, and for matrices only: w ← w − rate · (decay · w + direction).
    """
    update_some(dict(tree.named_leaves(params)), dict(tree.named_leaves(gradient)), state, recipe, step)


def update_some(
    params: Mapping[str, Array], gradient: Mapping[str, Array], state: State, recipe: TrainConfig, step: int
) -> None:
    """``update`` for the parameters that ``gradient`` names, and no others."""
    rate = learning_rate(step, recipe)
    for name, d in gradient.items():
        leaf = params[name]
        for rows in _pieces(leaf):
            moments = tree.map(itemgetter(rows), state[name])
            _update_piece(leaf[rows], d[rows], moments, recipe, step, rate)


def _update_piece(leaf: Array, d: Array, moments: Moments, recipe: TrainConfig, step: int, rate: float) -> None:
    if leaf.ndim > 1:
        leaf *= 1 - rate * recipe.weight_decay
    if moments.square is None:
        direction = muon.direction(d, moments.mean, recipe)
    else:
        direction = adamw.direction(d, moments.mean, moments.square, recipe, step)
    direction *= rate
    leaf -= direction


def _pieces(leaf: Array) -> list[slice]:
    """Cuts a stack of matrices into runs of whole matrices; on a GPU, where few large steps are better, into one."""
    if leaf.ndim < 3 or not isinstance(leaf, np.ndarray):
        return [slice(None)]
    count = max(1, PIECE // leaf[0].size)
    return [slice(start, start + count) for start in range(0, len(leaf), count)]
