"""How rows of tokens reach the owners of their experts, and how they return.

Where several workers share a step, each of them may own some of the experts. The mixture-of-experts layer is then given
an ``Exchange`` that sends rows between workers; ``minimoe.parallel.exchange`` implements it. Here stands the exchange
of a worker that owns every expert, which moves nothing.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar

from minimoe.core.arrays import Array

Tree = TypeVar("Tree")


class Exchange(Protocol):
    """Made anew for each routing, from the counts of its entries per expert."""

    @property
    def counts(self) -> list[int]:
        """How many rows arrive at each of this worker's own experts."""
        ...

    def own(self, experts: Tree) -> Tree:
        """Stacks of all experts → stacks of this worker's own."""
        ...

    def dispatch(self, rows: Array) -> Array:
        """This worker's rows, sorted by expert (M, ...) → every worker's rows for its own experts."""
        ...

    def return_rows(self, rows: Array) -> Array:
        """The rows of its own experts → this worker's rows, sorted by expert (M, ...): the inverse of ``dispatch``."""
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
