"""The optimiser's step: AdamW for all parameters, or Muon for the matrices of attention and experts and AdamW for the
rest.

Muon updates the parameters that the components mark as ``matrices``; AdamW updates the embedding, the output layer, the
routers and the norms. The moments of a parameter show which of the two updates it: only AdamW keeps a mean square.

A frozen parameter has no moments, and a parameter without moments is left alone: no update and no decay. ``trainable``
leaves frozen parameters out of a gradient, so they have no share in the norm by which the gradient is clipped.

Lesson: lessons/11_training.ipynb
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from minimoe.core import tree
from minimoe.core.arrays import Array, underflow_is_right
from minimoe.core.config import TrainConfig
from minimoe.core.errors import UserError, suggestion
from minimoe.core.summary import brief
from minimoe.optim import adamw, muon
from minimoe.optim.schedule import learning_rate

PIECE = 2**17
"""How many numbers of a stack are updated at a time: with their gradients and moments they fit in a core's cache."""


@brief
class Moments(NamedTuple):
    """What the optimiser stores for one parameter."""

    mean: Array  # running mean of the gradient
    square: Array | None  # running mean of its square; None for a matrix that Muon updates


State = dict[str, Moments]
"""The moments of all parameters that a gradient changes, by the name of the parameter."""


def init(params: Any, recipe: TrainConfig, frozen: Collection[str] = ()) -> State:
    """The state before the first step, for a tree of parameters; those that are marked ``state`` or are
    ``frozen`` have none.

    Raises:
        UserError: ``frozen`` holds what is not the name of a leaf.
    """
    names = [name for name, _ in tree.named_leaves(params)]
    for name in sorted(set(frozen) - set(names)):
        raise UserError(f"there is no parameter {name!r:.80} to freeze{suggestion(name, names)}: give the name of one.")
    without_gradient = {*tree.marked(params, "state"), *frozen}
    by_muon = set(tree.marked(params, "matrices")) if recipe.optimizer == "muon" else set()
    return {
        name: Moments(tree.zeros_like(leaf), None if name in by_muon else tree.zeros_like(leaf))
        for name, leaf in tree.named_leaves(params)
        if name not in without_gradient
    }


def update(params: Any, gradient: Any, state: State, recipe: TrainConfig, step: int) -> None:
    """Takes step number ``step`` (from 0): changes ``params`` and ``state`` in place.

    Weight decay is decoupled from the gradient and applies only to matrices: w ← w − rate · (decay · w + direction).
    """
    update_some(dict(tree.named_leaves(params)), dict(tree.named_leaves(gradient)), state, recipe, step)


def trainable(gradient: Mapping[str, Array], frozen: Collection[str]) -> dict[str, Array]:
    """The gradients of all parameters except the frozen ones."""
    return {name: d for name, d in gradient.items() if name not in frozen}


@underflow_is_right
def update_some(
    params: Mapping[str, Array], gradient: Mapping[str, Array], state: State, recipe: TrainConfig, step: int
) -> None:
    """``update`` for only the parameters that ``gradient`` names and for which ``state`` has moments."""
    rate = learning_rate(step, recipe)
    for name, d in gradient.items():
        if name not in state:  # frozen, or learned without a gradient
            continue
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
    """Cuts a stack of matrices into slices of whole matrices; on a GPU, where few large steps are better, into one."""
    if leaf.ndim < 3 or not isinstance(leaf, np.ndarray):
        return [slice(None)]
    count = max(1, PIECE // leaf[0].size)
    return [slice(start, start + count) for start in range(0, len(leaf), count)]
