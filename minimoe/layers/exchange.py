"""How the rows of tokens reach the workers that own their experts, and how they return.

If several workers share a step, each of them may own some of the experts. The mixture-of-experts layer then gets an
``Exchange`` that sends rows between workers; ``minimoe.parallel.exchange`` implements it. This file has the exchange of
a worker that owns every expert: it moves nothing.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar

from minimoe.core.arrays import Array

Tree = TypeVar("Tree")


class Exchange(Protocol):
    """Moves rows between workers. It is made for one routing, from the number of entries of each expert."""

    @property
    def counts(self) -> list[int]:
        """How many rows each expert of this worker receives."""
        ...

    def own(self, experts: Tree) -> Tree:
        """Stacks of all experts → stacks of the experts that this worker owns."""
        ...

    def dispatch(self, rows: Array) -> Array:
        """This worker's rows (M, ...), sorted by expert → all workers' rows for the experts of this worker."""
        ...

    def return_rows(self, rows: Array) -> Array:
        """All workers' rows for the experts of this worker → this worker's rows (M, ...), sorted by expert.

        This is the inverse of ``dispatch``.
        """
        ...


class LocalExchange(NamedTuple):
    """The exchange of one worker: it owns every expert, and rows stay where they are."""

    counts: list[int]

    def own(self, experts: Tree) -> Tree:
        return experts

    def dispatch(self, rows: Array) -> Array:
        return rows

    def return_rows(self, rows: Array) -> Array:
        return rows
