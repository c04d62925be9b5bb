"""Figures of mixtures: which expert a gate trusts at each point of a line or a plane.

Trust is drawn in the colours of the experts: a strong colour where one expert is trusted alone, a mixed colour where
several are. The functions draw into axes that the caller made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from minimoe.core.arrays import Array
from minimoe.draw import palette
from minimoe.draw.lesson_figures import INK, QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def lines_by_trust(axes: Axes, x: Array, output: Array, trust: Array) -> None:
    """Draws the output (G, E) of each expert over x (G,): a thin line, and a thick line whose opacity is the trust."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgb

    for e in range(output.shape[1]):
        colour = to_rgb(palette.colour(e))
        axes.plot(x, output[:, e], color=colour, linewidth=0.8, alpha=0.45)
        points = np.stack([x, output[:, e]], axis=1)
        opacity = (trust[1:, e] + trust[:-1, e]) / 2
        pieces = np.stack([points[:-1], points[1:]], axis=1)  # (G − 1, 2, 2)
        axes.add_collection(LineCollection(list(pieces), colors=[(*colour, a) for a in opacity], linewidths=5))


def plane_by_trust(axes: Axes, x: Array, y: Array, trust: Array, strength: float = 0.45) -> None:
    """Colours the plane by trust (Y, X, E) on the grid of x (X,) and y (Y,), which are evenly spaced.

    A point has the mean of the experts' colours, weighted with their trust; ``strength`` 0 is white, 1 the full colour.
    """
    from matplotlib.colors import to_rgb

    colours = np.array([to_rgb(palette.colour(e)) for e in range(trust.shape[2])])  # (E, 3)
    image = np.round(100 * (1 - strength * (1 - trust @ colours))) / 100  # steps that no eye sees make files smaller
    axes.imshow(image, origin="lower", aspect="auto", extent=(x[0], x[-1], y[0], y[-1]), interpolation="nearest")
    axes.grid(False)


def borders(axes: Axes, x: Array, y: Array, winner: Array) -> None:
    """Draws the lines between points of a grid that have different classes; winner (Y, X) has the class of each
    point."""
    for number in np.unique(winner)[:-1]:
        axes.contour(x, y, (winner <= number).astype(float), levels=[0.5], colors=INK, linewidths=1.3)


def clouds(axes: Axes, points: Array, label: Array, names: Sequence[str], colours: Sequence[str] | None = None) -> None:
    """Draws points (N, 2) as dots, grey if no colours are given, and the name of each label (N,) in the middle of
    its points."""
    from matplotlib.patheffects import withStroke

    for number, name in enumerate(names):
        chosen = points[label == number]
        colour = QUIET if colours is None else colours[number]
        axes.scatter(chosen[:, 0], chosen[:, 1], s=9, color=colour, linewidths=0)
        x, y = np.median(chosen, axis=0)
        border = [withStroke(linewidth=3, foreground="white")]
        axes.text(x, y, name, fontsize=17, weight="bold", color=INK, ha="center", va="center", path_effects=border)
