"""A group: the workers of a training step, as one of them sees the others.

Every worker runs the same code and knows its ``group``, through which they add up what each of them has. A sum is
always taken in the same order, so that its rounding repeats: small sums in the order of the workers, a gradient from
its owner's part on. This file holds the group of one worker; ``processes`` and ``threads`` implement the others.

Rajbhandari et al. 2019, arXiv 1910.02054 (ZeRO: each worker owns the total of a part of the gradient).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from minimoe.core import tree
from minimoe.core.arrays import Array

Tree = TypeVar("Tree")


class Group:
    """The workers of a step as one of them sees them. This one is alone."""

    rank = 0
    size = 1

    def all_gather(self, mine: Tree) -> list[Tree]:
        """What each worker has, by rank, told to all of them. Everyone must call it, and waits for all others."""
        return [mine]

    def all_reduce(self, mine: Tree) -> Tree:
        """The sum of what all workers have, the same for each of them."""
        return tree.add(*self.all_gather(mine))

    def barrier(self) -> None:
        """Returns when every worker has come this far."""
        self.all_gather(None)

    def part(self, count: int) -> slice:
        """This worker's of ``count`` things in a row, of which every worker has about equally many."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def assemble(self, part: Array, start: int, total: int) -> Array:
        """Everyone's rows (n, ...), worker below worker, this one's from ``start`` on → all of them (total, ...).

        Everyone must call it. The result is for reading, until the next call; until then everyone's rows must stay too.
        """
        return part

    def share(self, params: Mapping[str, Array]) -> list[str]:
        """The names of this worker's parameters: each has one owner, and the owners about equally many numbers."""
        held = [0] * self.size
        mine = []
        for name, leaf in sorted(params.items(), key=lambda named: -named[1].size):
            owner = held.index(min(held))
            held[owner] += leaf.size
            if owner == self.rank:
                mine.append(name)
        return mine

    def reduce_scatter(self, gradient: Mapping[str, Array], names: Collection[str]) -> dict[str, Array]:
        """The sum over all workers of the arrays called ``names``, which no other worker asks for.

        Everyone's ``gradient`` must stay as it is until all are done, up to the arrays that are returned.
        """
        for other in self.exchange(gradient, names):
            for name in names:
                gradient[name][...] += other[name]
        return {name: gradient[name] for name in names}

    def exchange(self, mine: Mapping[str, Array], names: Collection[str]) -> list[Mapping[str, Array]]:
        """Lets the others read all of ``mine`` but ``names`` → what the others have, by rank, for reading ``names``."""
        return []


ALONE = Group()

Work = Callable[[Group, Any], Any]
"""What each worker does with the message that it is sent."""

Run = Callable[[Sequence[Any]], Any]
"""Sends one message to each worker, waits for all of them, and returns the result of worker 0."""
