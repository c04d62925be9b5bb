"""One training step: the noise for the whole batch, the gradient in shards, clipping, and the optimiser's update.

    with step.open_workers(params, moments, config, recipe, count) as workers:
        shards = step.shard_batch(rng, workers.params, tokens, targets, config, recipe, count)
        totals, norm = workers.step(shards, number)

The trainer repeats this step, and the benchmark times the same code.  Lesson: lessons/11_training.ipynb
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.core import tree
from minimoe.core.arrays import Array, like
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.summary import brief
from minimoe.layers import decoder, moe
from minimoe.layers.decoder import Decoder
from minimoe.layers.exchange import LocalExchange
from minimoe.losses import objective as objectives
from minimoe.losses.balance import Coefficients
from minimoe.losses.objective import Objective, Shard, Totals
from minimoe.optim import clipping, optimizer
from minimoe.parallel import exchange
from minimoe.parallel.exchange import most_rows, worth_exchanging
from minimoe.parallel.group import ALONE, Group, Run, Work
from minimoe.parallel.launch import launch
from minimoe.parallel.processes import shared


@brief
class Workers(NamedTuple):
    """Workers that take steps together, and the arrays that they change."""

    params: Decoder
    moments: optimizer.State
    step: Callable[[Sequence[Shard], int], tuple[Totals, float]]  # the shards of a batch, the step's number (from 0)


def shard_batch(
    rng: np.random.Generator,
    params: Decoder,
    tokens: NDArray[Any],
    targets: NDArray[Any],
    config: ModelConfig,
    recipe: TrainConfig,
    workers: int,
) -> list[Shard]:
    """tokens and targets (B, T) on the host → the shards of ``cut``."""
    return cut(rng, params, Shard(tokens, targets), config, recipe, workers)


def cut(
    rng: np.random.Generator,
    params: Decoder,
    batch: Shard,
    config: ModelConfig,
    recipe: TrainConfig,
    workers: int,
    together: int = 1,
    noisy: bool = True,
) -> list[Shard]:
    """A batch on the host → a shard per worker and accumulated part, on the device of ``params``.

    The router's noise is drawn for the whole batch and then cut, so that it does not depend on the number of shards.
    ``together`` consecutive sequences stay in one shard. Unless ``noisy``, no noise is drawn.
    """
    B, T = batch.tokens.shape
    noise = decoder.draw_noise(rng, config, B, T, recipe.dtype) if noisy else None
    where = params.norm.gain
    units = np.arange(B).reshape(-1, together)
    pieces = np.array_split(units, min(len(units), workers * recipe.accumulate))

    def shard(piece: NDArray[Any]) -> Shard:
        rows = tree.map(lambda leaf: like(where, leaf[piece]), batch._replace(dropout=None))
        rows = rows._replace(dropout=tree.map(lambda mask: like(where, mask), batch.dropout))  # one for all sequences
        return rows if noise is None else rows._replace(noise=like(where, noise[:, piece]))

    return [shard(piece.reshape(-1)) for piece in pieces]


@contextlib.contextmanager
def open_workers(
    params: Decoder,
    moments: optimizer.State,
    config: ModelConfig,
    recipe: TrainConfig,
    count: int,
    objective: Objective | None = None,
    frozen: Collection[str] = (),
) -> Iterator[Workers]:
    """Opens ``count`` workers for the steps of a run. There must be at least one shard per worker.

    Without an ``objective``, they minimise that of the recipe: ``objective_of``. The ``frozen`` leaves stay as they
    are.

    Only the arrays of ``Workers`` are changed. With one worker these are the arrays that were passed in, with several
    they are copies in shared memory.
    """
    if count > 1:
        params = tree.map(shared, params)
        moments = {name: tree.map(shared, of_one) for name, of_one in moments.items()}

    def work(group: Group, task: tuple[Sequence[Shard], int]) -> tuple[Totals, float]:
        shards, number = task
        return train_step(params, moments, shards, config, recipe, number, group, objective, frozen)

    with launch_for(count, work, params, config, recipe) as run:
        yield Workers(params, moments, lambda shards, number: run([(shards[i::count], number) for i in range(count)]))


def launch_for(
    workers: int, work: Work, params: Decoder, config: ModelConfig, recipe: TrainConfig
) -> contextlib.AbstractContextManager[Run]:
    """``launch`` with enough shared memory for all that ``gradient`` moves between the workers."""
    named = dict(tree.named_leaves(params))
    if not worth_exchanging(config, recipe, workers):
        return launch(workers, work, named)
    _, added_up = exchange.split(named, set(tree.marked(params, "by_expert")))
    row_bytes = most_rows(config, recipe, workers) * config.width * params.norm.gain.itemsize
    return launch(workers, work, added_up, row_bytes=row_bytes)


def train_step(
    params: Decoder,
    moments: optimizer.State,
    shards: Sequence[Shard],
    config: ModelConfig,
    recipe: TrainConfig,
    number: int,
    group: Group = ALONE,
    objective: Objective | None = None,
    frozen: Collection[str] = (),
) -> tuple[Totals, float]:
    """Takes step ``number`` (from 0): changes ``params``, ``moments`` in place → losses, the norm before clipping.

    The ``frozen`` leaves stay as they are, and their gradients are no part of the norm. In a ``group``, every worker
    calls this with its own shards and updates its own share of the parameters. If the loss or the norm is not finite,
    nothing is changed.
    """
    totals, my_gradient = gradient(params, shards, config, recipe, group, objective, frozen)
    norm = float(clipping.clip(list(my_gradient.values()), recipe.clip, group))
    if is_finite(totals, norm):
        my_params, my_moments = dict(tree.named_leaves(params)), dict(moments)
        if worth_exchanging(config, recipe, group.size):
            # the gradient of a stack of experts covers only this worker's experts, so cut the parameters to match
            by_expert = set(tree.marked(params, "by_expert"))
            own = itemgetter(group.part(config.experts))
            my_params |= tree.map(own, exchange.split(my_params, by_expert)[0])
            my_moments |= tree.map(own, exchange.split(my_moments, by_expert)[0])
        optimizer.update_some(my_params, my_gradient, my_moments, recipe, number)
        if group.rank == 0:  # the totals are the same for all, so one of them writes
            named = dict(tree.named_leaves(params))
            still = {name: named[name].copy() for name in tree.marked(params, "state") if name in frozen}
            moe.update_state(decoder.mixtures(params), totals.stats, config, recipe)
            for name, before in still.items():
                named[name][...] = before
    group.barrier()
    return totals, norm


def gradient(
    params: Decoder,
    shards: Sequence[Shard],
    config: ModelConfig,
    recipe: TrainConfig,
    group: Group = ALONE,
    objective: Objective | None = None,
    frozen: Collection[str] = (),
) -> tuple[Totals, dict[str, Array]]:
    """The losses of a batch, and the gradients of this worker's share of the parameters that are not frozen, by name.

    If workers own different experts, a worker's share of every stack of experts is the experts that it owns.
    """
    owned = worth_exchanging(config, recipe, group.size)
    totals, through_mine = objectives.loss_and_gradient(
        params,
        shards,
        config,
        objective or objective_of(config, recipe),
        recompute=recipe.accumulate > 1,
        group=group,
        exchange=exchange.between(group) if owned else LocalExchange,
    )
    whole: dict[str, Array] = {}
    to_add_up = optimizer.trainable(dict(tree.named_leaves(through_mine)), frozen)
    if owned:  # the owner of an expert has already seen all tokens of that expert, so its gradient is whole
        whole, to_add_up = exchange.split(to_add_up, set(tree.marked(params, "by_expert")))
    return totals, whole | group.reduce_scatter(to_add_up, group.share(to_add_up))


def objective_of(config: ModelConfig, recipe: TrainConfig) -> Objective:
    """What a recipe minimises. If it names no coefficient of the balance loss, the router's own is used."""
    balance = recipe.balance_loss
    return Objective(
        Coefficients(
            moe.balance_coefficient(config) if balance is None else balance,
            recipe.importance_loss,
            recipe.load_loss,
            recipe.z_loss,
            recipe.sequence_loss,
        ),
        recipe.capacity_factor,
        recipe.pooled_balance,
    )


def is_finite(totals: Totals, norm: float) -> bool:
    """Whether a step's loss and the norm of its gradient are finite."""
    return math.isfinite(norm) and math.isfinite(float(totals.total))
