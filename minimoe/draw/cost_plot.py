"""The figure of a model's size: all of its parameters, and those used for one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minimoe.cost.costs import Costs
from minimoe.draw import figure_parts, palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PLACES = {
    "embedding": 0,
    "embedding and head": 0,
    "attention": 1,
    "experts": 2,
    "router": 3,
    "norms": 4,
    "norms and positions": 4,
    "head": 5,
    "dense feed-forward": 6,
    "dense layers": 6,
    "shared experts": 7,
    "shared": 7,
}
"""Which colour of the palette each part has; it is the same in every figure."""


def parameters(costs: Costs) -> Figure:
    """Two bars, total and active, each divided into the model's parts."""
    figure = figure_parts.figure(8, 2.8)
    axes = figure.subplots()
    left = {"total": 0, "active": 0}
    parts = {name: part for name, part in costs.parts.items() if part["total"]}
    for name, part in parts.items():
        colour = palette.COLOURS[PLACES[name]]
        for row in ("active", "total"):
            axes.barh(row, part[row], left=left[row], color=colour, label=name if row == "total" else None)
            left[row] += part[row]
    for row, size in left.items():
        axes.annotate(
            f" {figure_parts.in_thousands(float(f'{size:.3g}'), None)}", (size, row), va="center", fontsize=12
        )
    axes.set_xlim(0, 1.12 * costs.total)
    axes.xaxis.set_major_formatter(figure_parts.in_thousands)
    axes.set_xlabel("parameters")
    axes.set_title("\n".join(map(figure_parts.plain, filter(None, (costs.name, costs.source)))), fontsize=12)
    figure.legend(loc="outside lower center", ncols=min(len(parts), 4), frameon=False, fontsize=11)
    figure_parts.quieten(axes)
    return figure
