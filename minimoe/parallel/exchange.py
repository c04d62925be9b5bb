"""Expert parallelism: each worker keeps some of the experts, and rows of tokens travel to them and back.

    there    from W workers' rows, sorted by worker, then by expert, to rows sorted by expert, then by worker
    back     the other way

An owner gets all rows of an expert, and so its whole gradient: what travels is rows, what stays at home is experts and
their gradients, which data parallelism would have to add up. Each way is a permutation (an all-to-all), and the
gradient of one is the other.

Lepikhin et al. 2020, arXiv 2006.16668 (GShard).  Lesson: lessons/09_moe_layer.ipynb
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import itemgetter
from typing import NamedTuple, TypeVar

import numpy as np

from minimoe import tree
from minimoe.arrays import Array
from minimoe.config import ModelConfig, TrainConfig
from minimoe.data_parallel import Group

Tree = TypeVar("Tree")

WAITING = 2**20
"""Numbers of a layer that allow for the waiting of owners for each other: between the cases that ``pays`` names."""


class Journey(NamedTuple):
    """How rows travel between the workers of a group; where there is one worker, they stay."""

    group: Group
    sent: Array  # (W, E) integers: the rows that each worker has for each expert

    @property
    def part(self) -> slice:
        """Which experts are this worker's."""
        return self.group.part(self.sent.shape[1])

    @property
    def counts(self) -> list[int]:
        """How many rows come together at each of them."""
        counts: list[int] = self.sent[:, self.part].sum(0).tolist()
        return counts

    def own(self, experts: Tree) -> Tree:
        """Stacks of all experts → of this worker's."""
        return tree.map(itemgetter(self.part), experts)

    def there(self, rows: Array) -> Array:
        """This worker's rows, sorted by expert (M, ...) → all rows of its experts (sum of counts, ...)."""
        if self.group.size == 1:
            return rows
        places = _segments(self.sent)  # W × E
        start, stop = places[self.group.rank][0].start, places[self.group.rank][-1].stop
        everyones = self.group.assemble(rows[: stop - start], start, int(self.sent.sum()))
        by_expert = list(zip(*places, strict=True))[self.part]
        return np.concatenate([everyones[place] for of_expert in by_expert for place in of_expert])

    def back(self, rows: Array, length: int) -> Array:
        """All rows of its experts → this worker's, sorted by expert, zeros where none was sent (length, ...)."""
        if self.group.size == 1:
            return rows
        places = _segments(self.sent.T)  # E × W
        everyones = self.group.assemble(rows, places[self.part.start][0].start, int(self.sent.sum()))
        mine = np.zeros((length, *rows.shape[1:]), rows.dtype)
        sent = self.sent[self.group.rank].sum()
        np.concatenate([everyones[of_expert[self.group.rank]] for of_expert in places], out=mine[:sent])
        return mine


def begin(counts: list[int], group: Group) -> Journey:
    """Everyone tells the others how many rows it has for each expert (E)."""
    return Journey(group, np.array(group.all_gather(counts)))


def rows_travel(model: ModelConfig, recipe: TrainConfig, workers: int) -> bool:
    """Whether workers keep experts of their own: if everyone has some, and equally many shards, and if that pays."""
    shards = min(recipe.batch, workers * recipe.accumulate)
    possible = 1 < workers <= model.experts and shards % workers == 0
    return possible and pays(model, rows_at_once(model, recipe, workers))


def rows_at_once(model: ModelConfig, recipe: TrainConfig, workers: int) -> int:
    """The most rows, K for each token, that all workers together compute with at a time, each with one shard."""
    sequences = math.ceil(recipe.batch / (workers * recipe.accumulate))  # of a shard
    return workers * sequences * model.context * model.active_experts


def pays(model: ModelConfig, rows: int) -> bool:
    """Whether a step is quicker if the ``rows`` travel that are at work at once.

    In each layer they go there and back, forward and backward; what stays at home are the gradients of three matrices.
    The latter have to be at least twice as many numbers and ``WAITING`` more, since owners wait for each other in every
    layer. On 2 cores, gradients of the toy with other numbers of experts took, in ms:

        64 experts        218 where rows travel, 246 where they stay
        64, 4 shards each 530 and 660
        16, 4 shards each 330 and 335, so they stay, as for 8 wide experts
        8                 183 and 170, so they stay
        8, 8 shards each  460 and 380, so they stay
    """
    travelling = 4 * rows * model.width
    staying = 3 * model.experts * model.width * model.expert_width
    return staying - 2 * travelling >= WAITING


def split(named: Mapping[str, Tree]) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """Parameters, or what belongs to each, by name → stacks of experts, and all others."""
    experts = {name: one for name, one in named.items() if ".moe.experts." in name}
    return experts, {name: one for name, one in named.items() if name not in experts}


def _segments(counts: Array) -> list[list[slice]]:
    """Counts (A, B) of rows that follow each other → their slices."""
    stops = np.cumsum(counts).reshape(counts.shape)
    both = zip((stops - counts).tolist(), stops.tolist(), strict=True)
    return [[slice(*ends) for ends in zip(*lines, strict=True)] for lines in both]
