"""The assignment problem: give each row a column of its own, such that the sum of the chosen costs is least.

Rows are added one at a time. For each row, Dijkstra's algorithm finds the cheapest path of exchanges to a free column
in O(n²) steps, so n rows take O(n³). A price u_i for each row and a price v_j for each column keep all reduced costs
c_ij − u_i − v_j at zero or above. For each row and the column that it is given, the reduced cost is zero. These two
facts prove that the result is the best one: every assignment costs at least Σu + Σv, this one exactly that sum.

Kuhn 1955 (the Hungarian method); Jonker and Volgenant 1987 (shortest augmenting paths).
Lesson: lessons/52_merging_and_upcycling.ipynb
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.core.errors import UserError


class Assignment(NamedTuple):
    """The best assignment, and the prices that prove it."""

    columns: NDArray[np.int64]  # (n,)  the column of each row
    u: NDArray[np.float64]  # (n,)  price of each row
    v: NDArray[np.float64]  # (n,)  price of each column

    @property
    def cost(self) -> float:
        """The least sum of costs."""
        return float(self.u.sum() + self.v.sum())


def assign(cost: NDArray[Any]) -> Assignment:
    """cost (n, n) → the column of each row, for the least sum. ``UserError`` unless ``cost`` is square and finite."""
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1]:
        raise UserError(f"costs of shape {cost.shape} are not a square matrix: give a row and a column for each pair.")
    if not np.isfinite(cost).all():
        raise UserError(f"a cost is {cost[~np.isfinite(cost)][0]}: give finite costs.")
    n = len(cost)
    u, v = np.zeros(n), np.zeros(n)
    column_of, row_of = np.full(n, -1), np.full(n, -1)
    for start in range(n):
        # The tree of cheapest paths from ``start``: through which row, and at which reduced cost, is a column reached?
        reached, through, done = np.full(n, np.inf), np.full(n, -1), np.zeros(n, bool)
        row, so_far, rows = start, 0.0, [start]
        while True:
            new = so_far + cost[row] - u[row] - v
            shorter = ~done & (new < reached)
            reached[shorter], through[shorter] = new[shorter], row
            column = int(np.where(done, np.inf, reached).argmin())
            so_far = float(reached[column])
            if row_of[column] < 0:
                break
            done[column] = True
            row = int(row_of[column])
            rows.append(row)
        # New prices: along the tree the reduced costs become zero, and none becomes negative.
        u[start] += so_far
        for other in rows[1:]:
            u[other] += so_far - reached[column_of[other]]
        v[done] -= so_far - reached[done]
        # Back along the path: every row gives its column to the row before it.
        while column >= 0:
            row = int(through[column])
            row_of[column] = row
            column_of[row], column = column, int(column_of[row])
    return Assignment(column_of, u, v)
