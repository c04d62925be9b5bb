"""A group: the workers of a training step, from the point of view of one of them.

Every worker runs the same code with its own ``group`` object, through which the workers add up their values. A sum is
always taken in the same order, so that its rounding is reproducible: small sums are added in the order of the workers,
and a sum of gradients begins with the part of its owner. This file has the group of a single worker; ``processes`` and
``threads`` implement groups of several.

Rajbhandari et al. 2019, arXiv 1910.02054 (ZeRO: each worker owns the total of a part of the gradient).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from minimoe.core import tree
from minimoe.core.arrays import Array

Tree = TypeVar("Tree")


class Group:
    """The workers of a step, from the point of view of one of them. In this class, the worker is alone."""

    rank = 0
    size = 1

    def all_gather(self, mine: Tree) -> list[Tree]:
        """The values ``mine`` of all workers, by rank. Every worker must call this, and waits for all others."""
        return [mine]

    def all_reduce(self, mine: Tree) -> Tree:
        """The sum of the values ``mine`` of all workers, the same for each of them."""
        return tree.add(*self.all_gather(mine))

    def barrier(self) -> None:
        """Returns when every worker has called it."""
        self.all_gather(None)

    def part(self, count: int) -> slice:
        """This worker's slice of ``count`` items in a row. The slices of all workers are about equally long."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def assemble(self, part: Array, start: int, total: int) -> Array:
        """The rows (n, ...) of all workers, in the order of the workers → one array (total, ...).

        In the result, this worker's rows begin at ``start``. Every worker must call this function. The result may only
        be read, and only until the next call; until then, no worker may change its own rows either.
        """
        return part

    def share(self, params: Mapping[str, Array]) -> list[str]:
        """The names of the parameters that this worker owns.

        Each parameter has one owner, and all workers own about equally many numbers.
        """
        held = [0] * self.size  # numbers that each worker owns so far
        mine = []
        # The largest parameters first: each goes to the worker that owns the least so far.
        for name, leaf in sorted(params.items(), key=lambda named: -named[1].size):
            owner = held.index(min(held))
            held[owner] += leaf.size
            if owner == self.rank:
                mine.append(name)
        return mine

    def reduce_scatter(self, gradient: Mapping[str, Array], names: Collection[str]) -> dict[str, Array]:
        """The sum over all workers of the arrays called ``names``; every worker must pass different names.

        The sums are written into this worker's ``gradient`` and returned. No worker may change any other array of its
        ``gradient`` until all workers have finished.
        """
        for other in self.exchange(gradient, names):
            for name in names:
                gradient[name][...] += other[name]
        return {name: gradient[name] for name in names}

    def exchange(self, mine: Mapping[str, Array], names: Collection[str]) -> list[Mapping[str, Array]]:
        """Shows the arrays of ``mine``, except ``names``, to all others → what each worker shows, by rank.

        Of the returned arrays, only ``names`` may be read.
        """
        return []


ALONE = Group()

Work = Callable[[Group, Any], Any]
"""What each worker does: it is called with the worker's group and the message that the worker receives."""

Run = Callable[[Sequence[Any]], Any]
"""Sends one message to each worker, waits for all of them, and returns the result of worker 0."""
