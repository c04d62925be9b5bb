"""Expert parallelism: each worker owns some of the experts, and rows of tokens travel to them and back.

    dispatch       from W workers' rows, sorted by worker, then by expert, to rows sorted by expert, then by worker
    return_rows    the other way

An owner gets all rows of an expert, and so the whole gradient of it. Rows travel; experts and their gradients, which
data parallelism would have to add up, stay where they are. Each way is a permutation (an all-to-all), and the gradient
of one is the other.

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
"""Numbers per layer that stand for the time in which owners wait for each other: see ``exchange_is_faster``."""


class AllToAll(NamedTuple):
    """How rows travel between the workers of a group; where there is one worker, they stay."""

    group: Group
    sent: Array  # (W, E) integers: the rows that each worker has for each expert

    @property
    def part(self) -> slice:
        """Which experts are this worker's."""
        return self.group.part(self.sent.shape[1])

    @property
    def counts(self) -> list[int]:
        """How many rows arrive at each of them."""
        counts: list[int] = self.sent[:, self.part].sum(0).tolist()
        return counts

    def own(self, experts: Tree) -> Tree:
        """Stacks of all experts → stacks of this worker's own."""
        return tree.map(itemgetter(self.part), experts)

    def dispatch(self, rows: Array) -> Array:
        """This worker's rows, sorted by expert (M, ...) → all rows of its experts (sum of counts, ...)."""
        if self.group.size == 1:
            return rows
        places = _segments(self.sent)  # W × E
        start = places[self.group.rank][0].start
        everyones = self.group.assemble(rows, start, int(self.sent.sum()))
        by_expert = list(zip(*places, strict=True))[self.part]
        return np.concatenate([everyones[place] for of_expert in by_expert for place in of_expert])

    def return_rows(self, rows: Array) -> Array:
        """All rows of its experts → this worker's rows, sorted by expert (M, ...)."""
        if self.group.size == 1:
            return rows
        places = _segments(self.sent.T)  # E × W
        everyones = self.group.assemble(rows, places[self.part.start][0].start, int(self.sent.sum()))
        return np.concatenate([everyones[of_expert[self.group.rank]] for of_expert in places])


def between(group: Group) -> Callable[[list[int]], Exchange]:
    """The exchange of a group: a function of this worker's rows per expert (E), at which all workers meet."""
    return lambda counts: AllToAll(group, np.array(group.all_gather(counts)))


def worth_exchanging(config: ModelConfig, recipe: TrainConfig, workers: int) -> bool:
    """Whether workers own different experts: if each has some, and equally many shards, and if that is faster."""
    shards = min(recipe.batch, workers * recipe.accumulate)
    possible = 1 < workers <= config.experts and shards % workers == 0
    return possible and exchange_is_faster(config, rows_at_once(config, recipe, workers))


def rows_at_once(config: ModelConfig, recipe: TrainConfig, workers: int) -> int:
    """The most rows, K per token, that all workers together compute with at a time, each with one shard."""
    sequences = math.ceil(recipe.batch / (workers * recipe.accumulate))  # of a shard
    return workers * sequences * config.context * config.active_experts


def exchange_is_faster(config: ModelConfig, rows: int) -> bool:
    """Whether a step is faster if the ``rows`` that are computed at the same time travel.

    In each layer they travel there and back, forward and backward; what need not travel is the gradient of the experts.
    The gradient has to be at least twice as many numbers and ``WAITING_COST`` more, because owners wait for each other
    in every layer. On 2 cores, gradients of the toy with other numbers of experts took, in ms:

        64 experts        218 where rows travel, 246 where they stay
        64, 4 shards each 530 and 660
        16, 4 shards each 330 and 335, so they stay, as for 8 wide experts
        8                 183 and 170, so they stay
        8, 8 shards each  460 and 380, so they stay
    """
    travelling = 4 * rows * config.width
    staying = tree.size(moe.experts_of(config).blank(config, placeholder))
    return staying - 2 * travelling >= WAITING_COST


def split(named: Mapping[str, Tree], by_expert: Collection[str]) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """Parameters, or what belongs to each, by name → the stacks named in ``by_expert``, and all others."""
    return (
        {name: one for name, one in named.items() if name in by_expert},
        {name: one for name, one in named.items() if name not in by_expert},
    )


def _segments(counts: Array) -> list[list[slice]]:
    """Counts (A, B) of rows that follow each other → their slices."""
    stops = np.cumsum(counts).reshape(counts.shape)
    both = zip((stops - counts).tolist(), stops.tolist(), strict=True)
    return [[slice(*ends) for ends in zip(*lines, strict=True)] for lines in both]
