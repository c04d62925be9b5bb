"""The figure of a model's size: all of its parameters, and those at work for one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minimoe import canvas, palette
from minimoe.costs import Costs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def parameters(costs: Costs) -> Figure:
    """Two bars, total and active, each divided into the model's parts."""
    figure = canvas.figure(8, 2.8)
    axes = figure.subplots()
    left = {"total": 0, "active": 0}
    for i, (name, part) in enumerate(costs.parts.items()):
        for row in ("active", "total"):
            axes.barh(row, part[row], left=left[row], color=palette.colour(i), label=name if row == "total" else None)
            left[row] += part[row]
    for row, size in left.items():
        axes.annotate(f" {canvas.in_thousands(float(f'{size:.3g}'), None)}", (size, row), va="center", fontsize=12)
    axes.set_xlim(0, 1.12 * costs.total)
    axes.xaxis.set_major_formatter(canvas.in_thousands)
    axes.set_xlabel("parameters")
    axes.set_title(canvas.plain(costs.name), fontsize=13)
    figure.legend(loc="outside lower center", ncols=min(len(costs.parts), 4), frameon=False, fontsize=11)
    canvas.quieten(axes)
    return figure
