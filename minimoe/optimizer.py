"""AdamW and Muon, gradient clipping, and the learning rate's warm-up and cosine.

AdamW divides each entry of a gradient by its own recent size. Muon treats a matrix as a matrix: it replaces the
averaged gradient by the nearest (semi-)orthogonal matrix, so that every direction in it is learned equally fast.
Muon takes the attention and expert matrices; embedding, output layer, routers and norms are AdamW's.

Loshchilov and Hutter 2017, arXiv 1711.05101 (AdamW); Jordan 2024, kellerjordan.github.io/posts/muon, and Liu et al.
2025, arXiv 2502.16982 (Muon and its scale).  Lesson: lessons/11_training.ipynb
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from minimoe import tree
from minimoe.arrays import Array, array_module
from minimoe.config import TrainConfig
from minimoe.layers.decoder import Decoder
from minimoe.objective import Run

ADAM_EPS = 1e-8
_MATRICES = re.compile(r"\.attention\.\w+\.weight$|\.experts\.w_\w+$")


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


def update(params: Decoder, gradient: Decoder, state: State, config: TrainConfig, step: int, run: Run = map) -> None:
    """Takes step number ``step`` (from 0): changes ``params`` and ``state`` in place. ``run`` may be a thread pool's."""
    rate = learning_rate(step, config)

    def update_leaf(task: tuple[tuple[str, Array], Array]) -> None:
        (name, leaf), d = task
        decay = config.weight_decay if leaf.ndim > 1 else 0.0  # decay is for matrices, not for gains
        leaf *= 1 - rate * decay
        if is_muons(name, config):
            leaf -= rate * muon_direction(d, state[name], config)
        else:
            leaf -= rate * adam_direction(d, state[name], config, step)

    for _ in run(update_leaf, zip(tree.named_leaves(params), tree.leaves(gradient), strict=True)):
        pass


def adam_direction(d: Array, moments: Moments, config: TrainConfig, step: int) -> Array:
    """Gradient d → d̂ / (√ŝ + ε), with d̂ and ŝ the unbiased running means of d and d²; updates ``moments``.

        mean ← β₁ mean + (1 − β₁) d,    square ← β₂ square + (1 − β₂) d²,    x̂ = x / (1 − βᵗ)
    """
    xp = array_module(d)
    mean, square = moments
    assert square is not None
    mean *= config.beta1
    mean += (1 - config.beta1) * d
    square *= config.beta2
    square += (1 - config.beta2) * xp.square(d)
    size = xp.sqrt(square / (1 - config.beta2 ** (step + 1)))
    size += ADAM_EPS
    return mean / size / (1 - config.beta1 ** (step + 1))


def muon_direction(d: Array, moments: Moments, config: TrainConfig) -> Array:
    """Gradient d (..., rows, columns), one matrix or a stack → an orthogonal direction of AdamW's size.

    The mean gradient, looked ahead by one step (Nesterov), is orthogonalised. 0.2·√max(rows, columns) gives it the
    root-mean-square that AdamW's updates have, so that one learning rate serves both.
    """
    mean = moments.mean
    mean *= config.momentum
    mean += (1 - config.momentum) * d
    ahead = (1 - config.momentum) * d + config.momentum * mean
    return orthogonalize(ahead, config.newton_schulz_steps) * (0.2 * math.sqrt(max(d.shape[-2:])))


def orthogonalize(m: Array, steps: int = 5) -> Array:
    """m (..., rows, columns) → close to U Vᵀ, where m = U S Vᵀ, by Newton–Schulz steps; shape and dtype are kept.

    With X = m/‖m‖, each step X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X keeps U and V and moves every singular value s to
    a s + b s³ + c s⁵: an odd polynomial whose steps lead (0, 1] towards 1.
    """
    xp = array_module(m)
    matrices = m.reshape(-1, *m.shape[-2:])
    wide = matrices.shape[1] <= matrices.shape[2]
    result = xp.empty_like(matrices)
    # one matrix at a time stays in the processor's cache: faster than a batched product of the stack
    for x, out in zip(matrices if wide else matrices.swapaxes(1, 2), result if wide else result.swapaxes(1, 2), strict=True):
        x = x * (1 / (xp.sqrt(xp.square(x).sum()) + 1e-20))
        for a, b, c in [(3.4445, -4.7750, 2.0315)] * steps:
            gram = x @ x.T
            polynomial = c * (gram @ gram)
            polynomial += b * gram
            x = a * x + polynomial @ x
        out[...] = x
    return result.reshape(m.shape)


def global_norm(gradient: Decoder) -> Array:
    """√(Σ of all squares) over every array of the tree, a 0-d array in float64."""
    xp = array_module(tree.leaves(gradient)[0])
    squares: Iterable[Array] = (xp.vdot(leaf, leaf).astype("float64") for leaf in tree.leaves(gradient))
    return xp.sqrt(sum(squares))


def clip(gradient: Decoder, limit: float) -> Array:
    """Scales the gradient in place to a global norm of at most ``limit`` (0: no limit); returns the norm before."""
    norm = global_norm(gradient)
    if limit:
        scale = limit / array_module(norm).maximum(norm, limit)
        for leaf in tree.leaves(gradient):
            leaf *= scale.astype(leaf.dtype)
    return norm


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of step number ``step`` (from 0): linear warm-up, then half a cosine down to ``final_rate``."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    lowest = config.final_rate
    return config.learning_rate * (lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
