"""AdamW and Muon, gradient clipping, and the learning rate's warm-up and decay.

AdamW divides each entry of a gradient by its own recent size. Muon treats a matrix as a matrix: it replaces the
averaged gradient by the nearest (semi-)orthogonal matrix, so that every direction in it is learned equally fast.
Muon takes the attention and expert matrices; embedding, output layer, routers and norms are AdamW's.

Loshchilov and Hutter 2017, arXiv 1711.05101 (AdamW); Jordan 2024, kellerjordan.github.io/posts/muon, and Liu et al.
2025, arXiv 2502.16982 (Muon and its scale); Amsel et al. 2025, arXiv 2505.16932 (its polynomials); Bergsma et al.
2025, arXiv 2502.15938 (decay to zero).  Lesson: lessons/11_training.ipynb
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from minimoe import tree
from minimoe.arrays import Array, array_module
from minimoe.config import TrainConfig
from minimoe.data_parallel import ALONE, Group
from minimoe.layers.decoder import Decoder

ADAM_EPS = 1e-8
PIECE = 2**17
"""Numbers of a stack that are updated at a time: with all that belongs to them they fit a core's cache."""

_MATRICES = re.compile(r"\.attention\.\w+\.weight$|\.experts\.w_\w+$")

POLYNOMIALS = (
    (8.2987, -24.4305, 18.0903),
    (3.9152, -2.9211, 0.5592),
    (3.1746, -2.3804, 0.4978),
    (2.1895, -1.5672, 0.4079),
    (1.8750, -1.2500, 0.3750),
)
"""(a, b, c) of the steps a s + b s³ + c s⁵ that together bring singular values s in [0.005, 1] closest to 1.

Each is the best polynomial for the interval that the one before it leaves: the first for [0.005, 1], which becomes
[0.04, 1.96], then [0.16, 1.84], [0.50, 1.50], [0.92, 1.08]. Later steps repeat the last, whose limit is exactly 1.
"""


class Moments(NamedTuple):
    """What the optimiser remembers of one parameter."""

    mean: Array  # running mean of the gradient
    square: Array | None  # AdamW: running mean of its square


State = dict[str, Moments]
"""The optimiser's memory, by the name of the parameter."""


def is_muons(name: str, config: TrainConfig) -> bool:
    """Whether Muon, not AdamW, updates the parameter called ``name``."""
    return config.optimizer == "muon" and _MATRICES.search(name) is not None


def init(params: Decoder, config: TrainConfig) -> State:
    """An optimiser that has seen nothing."""
    return {
        name: Moments(tree.zeros_like(leaf), None if is_muons(name, config) else tree.zeros_like(leaf))
        for name, leaf in tree.named_leaves(params)
    }


def update(params: Decoder, gradient: Decoder, state: State, config: TrainConfig, step: int) -> None:
    """Takes step number ``step`` (from 0): changes ``params`` and ``state`` in place.

    Weight decay is decoupled from the gradient, and for matrices only: w ← w − rate · (decay · w + direction).
    """
    update_some(dict(tree.named_leaves(params)), dict(tree.named_leaves(gradient)), state, config, step)


def update_some(
    params: Mapping[str, Array], gradient: Mapping[str, Array], state: State, config: TrainConfig, step: int
) -> None:
    """``update`` for the parameters that ``gradient`` names, and no others."""
    rate = learning_rate(step, config)
    for name, d in gradient.items():
        leaf = params[name]
        for rows in _pieces(leaf):
            moments = tree.map(itemgetter(rows), state[name])
            _update_piece(name, leaf[rows], d[rows], moments, config, step, rate)


def _update_piece(
    name: str, leaf: Array, d: Array, moments: Moments, config: TrainConfig, step: int, rate: float
) -> None:
    if leaf.ndim > 1:
        leaf *= 1 - rate * config.weight_decay
    if is_muons(name, config):
        direction = muon_direction(d, moments.mean, config)
    else:
        direction = adam_direction(d, moments, config, step)
    direction *= rate
    leaf -= direction


def _pieces(leaf: Array) -> list[slice]:
    """Cuts a stack of matrices into runs of whole matrices; on a GPU, where few large steps are better, into one."""
    if leaf.ndim < 3 or not isinstance(leaf, np.ndarray):
        return [slice(None)]
    count = max(1, PIECE // leaf[0].size)
    return [slice(start, start + count) for start in range(0, len(leaf), count)]


def adam_direction(d: Array, moments: Moments, config: TrainConfig, step: int) -> Array:
    """Gradient d → d̂ / (√ŝ + ε), with d̂ and ŝ the unbiased running means of d and d²; updates ``moments``.

    mean ← β₁ mean + (1 − β₁) d,    square ← β₂ square + (1 − β₂) d²,    x̂ = x / (1 − βᵗ)
    """
    xp = array_module(d)
    mean, square = moments
    assert square is not None
    fresh = (1 - config.beta1) * d
    mean *= config.beta1
    mean += fresh
    xp.square(d, out=fresh)
    fresh *= 1 - config.beta2
    square *= config.beta2
    square += fresh
    size = xp.multiply(square, 1 / (1 - config.beta2 ** (step + 1)), out=fresh)
    xp.sqrt(size, out=size)
    size += ADAM_EPS
    size *= 1 - config.beta1 ** (step + 1)
    return xp.divide(mean, size, out=size)


def muon_direction(d: Array, mean: Array, config: TrainConfig) -> Array:
    """Gradient d (..., rows, columns) → 0.2·√max(rows, columns) times an orthogonal matrix; updates ``mean``.

        mean ← μ mean + (1 − μ) d,    ahead = μ mean + (1 − μ) d

    ``ahead`` looks one step further (Nesterov) and is what is orthogonalised. The factor gives the direction the
    root-mean-square of AdamW's, so that one learning rate serves both.
    """
    fresh = (1 - config.momentum) * d
    mean *= config.momentum
    mean += fresh
    fresh += config.momentum * mean
    direction = orthogonalize(fresh, config.newton_schulz_steps)
    direction *= 0.2 * math.sqrt(max(d.shape[-2:]))
    return direction


def orthogonalize(m: Array, steps: int = 3) -> Array:
    """m (..., rows, columns) → close to U Vᵀ, where m = U S Vᵀ, by Newton–Schulz steps; shape and dtype are kept.

    With X = m/‖m‖, each step X ← (a + b X Xᵀ + c (X Xᵀ)²) X keeps U and V and moves every singular value s to the
    odd polynomial a s + b s³ + c s⁵. ``POLYNOMIALS`` lead s from [0.005, 1] to 1 ± 0.50 in three steps, ± 0.08 in
    four, ± 0.002 in five; smaller s grow by a factor of up to 103, 226, 423. Zero stays zero.
    """
    xp = array_module(m)
    wide = m.shape[-2] <= m.shape[-1]
    x = m if wide else m.swapaxes(-1, -2)  # the products X Xᵀ are then as small as can be
    norm = xp.sqrt(xp.einsum("...rc,...rc->...", x, x))[..., None, None]
    x = x / xp.maximum(norm, np.finfo(m.dtype).tiny ** 0.5)  # squares of smaller numbers are lost
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


def squared_norm(gradient: Any) -> Any:
    """Σ of all squares over every array of the tree, a 0-d array in float64; each array's in its own dtype."""
    squares: Iterable[Any] = (array_module(leaf).vdot(leaf, leaf).astype("float64") for leaf in tree.leaves(gradient))
    return sum(squares)


def clip(gradient: Any, limit: float, group: Group = ALONE) -> Array:
    """Scales the gradient in place to a global norm of at most ``limit`` (0: no limit); returns the norm before.

    In a ``group``, each worker has a part of the gradient, and the norm is that of all parts together.
    """
    squares = group.all_reduce(squared_norm(gradient))
    norm: Array = array_module(squares).sqrt(squares)
    if limit:
        scale = limit / array_module(norm).maximum(norm, limit)
        for leaf in tree.leaves(gradient):
            leaf *= scale.astype(leaf.dtype)
    return norm


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of step number ``step`` (from 0): linear warm-up, then half a cosine or a line down."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    left = 1 - min(progress, 1.0)
    if config.schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * left)
