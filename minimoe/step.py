"""One training step: noise for the whole batch, its gradient in shards, a clip, and the optimiser's update.

    shards = step.cut(rng, params, tokens, targets, model, recipe, threads)
    totals, norm = step.take(params, moments, shards, model, recipe, number, pool)

The trainer repeats it, and the benchmark times the very same.  Lesson: lessons/11_training.ipynb
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimoe import objective, optimizer
from minimoe.arrays import like
from minimoe.config import ModelConfig, TrainConfig
from minimoe.layers.balance import Coefficients
from minimoe.layers.decoder import Decoder
from minimoe.objective import Objective, Run, Shard, Totals


def cut(
    rng: np.random.Generator,
    params: Decoder,
    tokens: NDArray[Any],
    targets: NDArray[Any],
    model: ModelConfig,
    recipe: TrainConfig,
    threads: int,
) -> list[Shard]:
    """tokens and targets (B, T) on the host → a shard for each thread and each accumulated part, where ``params`` live.

    The router's noise is drawn for the whole batch and cut with it, so that it does not depend on the number of shards.
    """
    batch, context = tokens.shape
    noise: NDArray[Any] | None = None
    if model.noisy_gating:
        shape = (model.layers, batch, context, model.experts)
        noise = rng.standard_normal(shape, np.dtype(recipe.dtype).type)
    where = params.norm.gain
    pieces = np.array_split(np.arange(batch), min(batch, threads * recipe.accumulate))
    return [
        Shard(
            like(where, tokens[piece]),
            like(where, targets[piece]),
            None if noise is None else like(where, noise[:, piece]),
        )
        for piece in pieces
    ]


def take(
    params: Decoder,
    moments: optimizer.State,
    shards: Sequence[Shard],
    model: ModelConfig,
    recipe: TrainConfig,
    number: int,
    run: Run = map,
) -> tuple[Totals, float]:
    """Step ``number`` (from 0) changes ``params`` and ``moments`` in place → the losses, the gradient's norm unclipped.

    Where loss or norm is not a finite number, everything stays as it was.
    """
    goal = Objective(
        Coefficients(recipe.balance_loss, recipe.importance_loss, recipe.load_loss, recipe.z_loss),
        recipe.capacity_factor,
        recipe.pooled_balance,
    )
    totals, gradient = objective.loss_and_gradient(
        params, shards, model, goal, run=run, recompute=recipe.accumulate > 1
    )
    norm = float(optimizer.clip(gradient, recipe.clip))
    if is_finite(totals, norm):
        optimizer.update(params, gradient, moments, recipe, number, run)
    return totals, norm


def is_finite(totals: Totals, norm: float) -> bool:
    """Whether a step's loss and the norm of its gradient are numbers to go on with."""
    return math.isfinite(norm) and math.isfinite(float(totals.total))
