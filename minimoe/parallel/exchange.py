"""Expert parallelism: each worker owns some of the experts, and the rows of tokens are sent to the owners and back.

    dispatch       from W workers' rows, sorted by worker, then by expert, to rows sorted by expert, then by worker
    return_rows    the reverse

The owner of an expert gets all rows of that expert, and so computes its whole gradient. Only rows are sent; experts and
their gradients, which data parallelism would have to add up, stay where they are. Each direction is a permutation (an
all-to-all), and the gradient of one direction is the other.

Lepikhin et al. 2020, arXiv 2006.16668 (GShard).  Lesson: lessons/09_moe_layer.ipynb
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from operator import itemgetter
from typing import NamedTuple, TypeVar

import numpy as np

from minimoe.core import tree
from minimoe.core.arrays import Array, placeholder
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.layers import moe
from minimoe.layers.exchange import Exchange
from minimoe.parallel.group import Group

Tree = TypeVar("Tree")

WAITING_COST = 2**20
"""How many numbers could be added up while owners wait for each other in a layer: see ``exchange_is_faster``."""


class AllToAll(NamedTuple):
    """Sends rows between the workers of a group. With a single worker, rows stay where they are."""

    group: Group
    sent: Array  # (W, E) integers: the number of rows that each worker has for each expert

    @property
    def part(self) -> slice:
        """The experts that this worker owns."""
        return self.group.part(self.sent.shape[1])

    @property
    def counts(self) -> list[int]:
        """How many rows each expert of this worker receives."""
        counts: list[int] = self.sent[:, self.part].sum(0).tolist()
        return counts

    def own(self, experts: Tree) -> Tree:
        """Stacks of all experts → stacks of the experts that this worker owns."""
        return tree.map(itemgetter(self.part), experts)

    def dispatch(self, rows: Array) -> Array:
        """This worker's rows (M, ...), sorted by expert → all rows of its experts (sum of counts, ...)."""
        if self.group.size == 1:
            return rows
        places = _segments(self.sent)  # W × E: where the rows of each worker for each expert are in everyones
        start = places[self.group.rank][0].start
        everyones = self.group.assemble(rows, start, int(self.sent.sum()))
        by_expert = list(zip(*places, strict=True))[self.part]
        return np.concatenate([everyones[place] for of_expert in by_expert for place in of_expert])

    def return_rows(self, rows: Array) -> Array:
        """All rows of its experts (sum of counts, ...) → this worker's rows (M, ...), sorted by expert."""
        if self.group.size == 1:
            return rows
        places = _segments(self.sent.T)  # E × W
        everyones = self.group.assemble(rows, places[self.part.start][0].start, int(self.sent.sum()))
        return np.concatenate([everyones[of_expert[self.group.rank]] for of_expert in places])


def between(group: Group) -> Callable[[list[int]], Exchange]:
    """The exchange of a group: a function that takes the number of this worker's rows for each expert, a list of E.

    All workers must call that function at the same time.
    """
    return lambda counts: AllToAll(group, np.array(group.all_gather(counts)))


def worth_exchanging(config: ModelConfig, recipe: TrainConfig, workers: int) -> bool:
    """Whether each worker should own some of the experts.

    This needs at least one expert for each worker, parameters that are stacks of all E experts, and the same number of
    shards for all workers. The exchange must also be faster.
    """
    shards = min(recipe.batch, workers * recipe.accumulate)
    stacks = tree.leaves(moe.experts_of(config).blank(config, placeholder))
    divisible = all(len(stack) == config.experts for stack in stacks)
    possible = divisible and 1 < workers <= config.experts and shards % workers == 0
    return possible and exchange_is_faster(config, rows_at_once(config, recipe, workers))


def rows_at_once(config: ModelConfig, recipe: TrainConfig, workers: int) -> int:
    """The number of rows that are processed at a time if every worker has one shard: K for each token."""
    sequences = math.ceil(recipe.batch / (workers * recipe.accumulate))  # in a shard
    return workers * sequences * config.context * config.active_experts


def most_rows(config: ModelConfig, recipe: TrainConfig, workers: int) -> int:
    """The number of rows that there must be room for: more than K per token if the router may choose more."""
    return rows_at_once(config, recipe, workers) // config.active_experts * moe.most_experts(config)


def exchange_is_faster(config: ModelConfig, rows: int) -> bool:
    """Whether a step is faster if the ``rows`` that are processed at the same time are sent to the owners of experts.

    In each layer the rows are sent there and back, in forward and in backward. In return, the gradient of the experts
    need not be added up between workers. The exchange is chosen only if that gradient has at least twice as many
    numbers as these four transfers together, plus ``WAITING_COST``, which is there because owners wait for
    each other in every layer. On 2 cores, a gradient of ``toy`` with other numbers of experts took, in ms:

        experts                      rows sent    rows kept
        64                           218          246
        64, 4 shards per worker      530          660
        16, 4 shards per worker      330          335          close: the rows are kept
        8                            183          170
        8, 8 shards per worker       460          380

    With 8 wide experts both took the same time, and the rows are kept in this case too.
    """
    travelling = 4 * rows * config.width
    staying = tree.size(moe.experts_of(config).blank(config, placeholder))
    return staying - 2 * travelling >= WAITING_COST


def split(named: Mapping[str, Tree], by_expert: Collection[str]) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """A dictionary whose keys are names of parameters → its entries named in ``by_expert``, and the other entries."""
    return (
        {name: one for name, one in named.items() if name in by_expert},
        {name: one for name, one in named.items() if name not in by_expert},
    )


def _segments(counts: Array) -> list[list[slice]]:
    """Counts (A, B) of consecutive rows → A lists of B slices."""
    stops = np.cumsum(counts).reshape(counts.shape)
    both = zip((stops - counts).tolist(), stops.tolist(), strict=True)
    return [[slice(*ends) for ends in zip(*lines, strict=True)] for lines in both]
