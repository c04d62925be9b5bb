"""Small drawings for the lessons: matrices with their numbers in them, and the style of all lesson figures.

Every figure has a white background, so that it looks the same on a light page and on a dark page. The colours are those
of the experts (``minimoe.draw.palette``); the negative entries of a matrix are blue and the positive ones orange.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from minimoe.core.arrays import Array
from minimoe.draw import palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET = "#222222", "#767676"
CELL = 0.52
"""Width of a matrix entry in inches; its height is three quarters of that."""


def style() -> None:
    """Sets matplotlib's defaults for a lesson: call it once, in the first cell."""
    import matplotlib.pyplot as plt
    from cycler import cycler

    plt.rcParams.update(
        {
            "axes.axisbelow": True,
            "axes.edgecolor": QUIET,
            "axes.grid": True,
            "axes.prop_cycle": cycler(color=palette.COLOURS),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
            "figure.constrained_layout.use": True,
            "figure.dpi": 90,
            "figure.facecolor": "white",
            "figure.figsize": (7, 3.2),
            "font.size": 10,
            "grid.color": "#E6E6E6",
            "legend.frameon": False,
            "lines.linewidth": 2,
            "savefig.facecolor": "white",
            "text.color": INK,
        }
    )


def matrix(
    axes: Axes, values: Array, title: str = "", *, digits: int = 1, largest: float | None = None, numbers: bool = True
) -> None:
    """Draws values (rows, columns), or one row (columns,), as coloured cells with their numbers.

    ``largest`` is the |value| with the strongest colour, by default the largest |value| of this matrix. A NaN is drawn
    as an empty cell.
    """
    from matplotlib.colors import LinearSegmentedColormap

    values = np.atleast_2d(np.asarray(values, float))
    largest = largest or float(np.nanmax(np.abs(values), initial=0)) or 1.0
    colours = LinearSegmentedColormap.from_list("sign", [palette.COLOURS[0], "#FFFFFF", palette.COLOURS[5]])
    image = axes.imshow(values, colours, vmin=-largest, vmax=largest, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if numbers and np.isfinite(value):
            red, green, blue, _ = (round(255 * part) for part in image.to_rgba(value))
            ink = palette.ink(f"#{red:02X}{green:02X}{blue:02X}")
            axes.text(column, row, number(value, digits), color=ink, ha="center", va="center")
    axes.set_xticks(np.arange(values.shape[1] + 1) - 0.5, [""] * (values.shape[1] + 1))
    axes.set_yticks(np.arange(values.shape[0] + 1) - 0.5, [""] * (values.shape[0] + 1))
    axes.grid(True, color="#D0D0D0", linewidth=0.8)
    axes.tick_params(length=0)
    axes.spines[:].set(visible=True, color="#D0D0D0")
    axes.set_title(title, loc="center")


def equation(*parts: Array | str | tuple[str, Array], digits: int = 1) -> Figure:
    """Draws an equation of matrices side by side: ``equation(("x", x), "@", ("W", W), "=", ("y", y))``.

    A pair is a matrix with its title; a string is drawn between two matrices.
    """
    import matplotlib.pyplot as plt

    arrays = [np.atleast_2d(part[1]) if isinstance(part, tuple) else None for part in parts]
    widths = [0.45 if array is None else CELL * array.shape[1] for array in arrays]
    rows = max(array.shape[0] for array in arrays if array is not None)
    figure, panels = plt.subplots(
        1,
        len(parts),
        figsize=(sum(widths) + 0.12 * len(parts), 0.75 * CELL * rows + 0.45),
        width_ratios=widths,
        squeeze=False,
    )
    for axes, part, array in zip(panels[0], parts, arrays, strict=True):
        if array is None:
            axes.axis("off")
            axes.text(0.5, 0.5, str(part), ha="center", va="center", fontsize=14, transform=axes.transAxes)
        else:
            matrix(axes, array, str(part[0]), digits=digits)
            axes.set_box_aspect(0.75 * array.shape[0] / array.shape[1])
    return figure


def number(value: float, digits: int) -> str:
    """A value with at most ``digits`` digits after the point: 2, −0.5, 1.25, with a true minus sign."""
    text = f"{value:.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text.replace("-", "−")
