"""One training step: noise for the whole batch, its gradient in shards, a clip, and the optimiser's update.

    with step.together(params, moments, model, recipe, workers) as team:
        shards = step.cut(rng, team.params, tokens, targets, model, recipe, workers)
        totals, norm = team.take(shards, number)

The trainer repeats it, and the benchmark times the very same.  Lesson: lessons/11_training.ipynb
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe import data_parallel, expert_parallel, objective, optimizer, tree
from minimoe.arrays import Array, like
from minimoe.config import ModelConfig, TrainConfig
from minimoe.data_parallel import ALONE, Group, Work
from minimoe.expert_parallel import rows_at_once, rows_travel
from minimoe.layers.balance import Coefficients
from minimoe.layers.decoder import Decoder
from minimoe.objective import Objective, Shard, Totals


class Team(NamedTuple):
    """Workers that take steps together, and what they change."""

    params: Decoder
    moments: optimizer.State
    take: Callable[[Sequence[Shard], int], tuple[Totals, float]]  # the shards of a batch, the step's number (from 0)


def cut(
    rng: np.random.Generator,
    params: Decoder,
    tokens: NDArray[Any],
    targets: NDArray[Any],
    model: ModelConfig,
    recipe: TrainConfig,
    workers: int,
) -> list[Shard]:
    """tokens and targets (B, T) on the host → a shard for each worker and each accumulated part, where ``params`` live.

    The router's noise is drawn for the whole batch and cut with it, so that it does not depend on the number of shards.
    """
    batch, context = tokens.shape
    noise: NDArray[Any] | None = None
    if model.noisy_gating:
        shape = (model.layers, batch, context, model.experts)
        noise = rng.standard_normal(shape, np.dtype(recipe.dtype).type)
    where = params.norm.gain
    pieces = np.array_split(np.arange(batch), min(batch, workers * recipe.accumulate))
    return [
        Shard(
            like(where, tokens[piece]),
            like(where, targets[piece]),
            None if noise is None else like(where, noise[:, piece]),
        )
        for piece in pieces
    ]


@contextlib.contextmanager
def together(
    params: Decoder, moments: optimizer.State, model: ModelConfig, recipe: TrainConfig, workers: int
) -> Iterator[Team]:
    """Opens a team of ``workers`` for the steps of a run, each on its part of the shards: ``workers`` of them at least.

    Only the arrays of the team are changed, which are the same as those passed in where there is one worker.
    """
    if workers > 1:
        params = tree.map(data_parallel.shared, params)
        moments = {name: tree.map(data_parallel.shared, of_one) for name, of_one in moments.items()}

    def work(group: Group, task: tuple[Sequence[Shard], int]) -> tuple[Totals, float]:
        shards, number = task
        return take(params, moments, shards, model, recipe, number, group)

    with workers_for(workers, work, params, model, recipe) as run:
        yield Team(params, moments, lambda shards, number: run([(shards[i::workers], number) for i in range(workers)]))


def workers_for(
    workers: int, work: Work, params: Decoder, model: ModelConfig, recipe: TrainConfig
) -> contextlib.AbstractContextManager[Callable[[Sequence[Any]], Any]]:
    """``data_parallel.workers`` with room for all that ``gradient`` moves between them."""
    named = dict(tree.named_leaves(params))
    if not rows_travel(model, recipe, workers):
        return data_parallel.workers(workers, work, named)
    _, added_up = expert_parallel.split(named)
    board = rows_at_once(model, recipe, workers) * model.width * params.norm.gain.itemsize
    return data_parallel.workers(workers, work, added_up, board=board)


def take(
    params: Decoder,
    moments: optimizer.State,
    shards: Sequence[Shard],
    model: ModelConfig,
    recipe: TrainConfig,
    number: int,
    group: Group = ALONE,
) -> tuple[Totals, float]:
    """Step ``number`` (from 0) changes ``params`` and ``moments`` in place → the losses, the gradient's norm unclipped.

    In a ``group``, every worker takes it on its own shards and updates its own share of the parameters. Where loss or
    norm is not a finite number, everything stays as it was.
    """
    totals, my_gradient = gradient(params, shards, model, recipe, group)
    norm = float(optimizer.clip(list(my_gradient.values()), recipe.clip, group))
    if is_finite(totals, norm):
        my_params, my_moments = dict(tree.named_leaves(params)), dict(moments)
        if rows_travel(model, recipe, group.size):
            own = itemgetter(group.part(model.experts))
            my_params |= tree.map(own, expert_parallel.split(my_params)[0])
            my_moments |= tree.map(own, expert_parallel.split(my_moments)[0])
        optimizer.update_some(my_params, my_gradient, my_moments, recipe, number)
    group.barrier()
    return totals, norm


def gradient(
    params: Decoder, shards: Sequence[Shard], model: ModelConfig, recipe: TrainConfig, group: Group = ALONE
) -> tuple[Totals, dict[str, Array]]:
    """The losses of a batch, and the gradients of this worker's share of the parameters, by name.

    Where rows travel, its share of every stack of experts is its own experts.
    """
    goal = Objective(
        Coefficients(recipe.balance_loss, recipe.importance_loss, recipe.load_loss, recipe.z_loss),
        recipe.capacity_factor,
        recipe.pooled_balance,
    )
    owners = group if rows_travel(model, recipe, group.size) else ALONE
    totals, through_mine = objective.loss_and_gradient(
        params, shards, model, goal, recompute=recipe.accumulate > 1, group=group, owners=owners
    )
    whole: dict[str, Array] = {}
    to_add_up = dict(tree.named_leaves(through_mine))
    if owners.size > 1:
        whole, to_add_up = expert_parallel.split(to_add_up)
    return totals, whole | group.reduce_scatter(to_add_up, group.share(to_add_up))


def is_finite(totals: Totals, norm: float) -> bool:
    """Whether a step's loss and the norm of its gradient are numbers to go on with."""
    return math.isfinite(norm) and math.isfinite(float(totals.total))
