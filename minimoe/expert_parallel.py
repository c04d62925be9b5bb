"""Expert parallelism: each worker keeps some of the experts, and rows of tokens travel to them and back.

    there    from W workers' rows, sorted by worker, then by expert, to rows sorted by expert, then by worker
    back     the other way

An owner gets all rows of an expert, and so its whole gradient: what travels is rows, what stays at home is experts and
their gradients, which data parallelism would have to add up. Both ways are permutations (together, an all-to-all), so
the gradient of one is the other.

Lepikhin et al. 2020, arXiv 2006.16668 (GShard).  Lesson: lessons/09_moe_layer.ipynb
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import NamedTuple, TypeVar

import numpy as np

from minimoe import tree
from minimoe.arrays import Array
from minimoe.config import ModelConfig
from minimoe.data_parallel import Group

Tree = TypeVar("Tree")


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


def pays(model: ModelConfig, tokens: int) -> bool:
    """Whether a step of so many tokens, of all workers, is quicker if rows travel.

    In a layer N·K rows go there and back twice, forward and backward; at home stay the gradients of three matrices.
    They should be twice as many numbers, since owners wait for each other in every layer. On 2 cores a gradient of the
    toy with 64 experts (3 times as many) took 218 ms instead of 246, with its 8 (0.4 times) 183 instead of 170, and a
    model of 8 wide experts (1.1 times) as long as before.
    """
    travelling = 4 * tokens * model.active_experts * model.width
    staying = 3 * model.experts * model.width * model.expert_width
    return staying >= 2 * travelling


def is_an_expert(name: str) -> bool:
    """Whether the parameter called ``name`` is a stack of all experts."""
    return ".moe.experts." in name


def cut(named: Mapping[str, Tree], part: slice) -> dict[str, Tree]:
    """Parameters, or what belongs to each, by name → the same, of stacks of experts a part only."""
    return {name: tree.map(itemgetter(part), one) if is_an_expert(name) else one for name, one in named.items()}


def _segments(counts: Array) -> list[list[slice]]:
    """Counts (A, B) of rows that follow each other → their slices."""
    stops = np.cumsum(counts).reshape(counts.shape)
    both = zip((stops - counts).tolist(), stops.tolist(), strict=True)
    return [[slice(*ends) for ends in zip(*lines, strict=True)] for lines in both]
