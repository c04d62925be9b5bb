"""What all figures share: a white background, plain axes, labelled guide lines, and the experts' colours and dashes.

Figures are made without pyplot, which keeps every figure in a global list: here a figure is a value like any other.
"""

from __future__ import annotations

import contextlib
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Literal, TypeAlias

from minimoe.core.arrays import Array
from minimoe.core.errors import printable
from minimoe.draw import palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUIET = "#767676"  # guide lines; contrast 4.5 on white
Line: TypeAlias = Literal["-", "--", ":", "-."]
DASHES: tuple[Line, ...] = ("-", "--", ":", "-.")
"""The second eight experts have the colours of the first eight with dashed lines, the third with dotted, and so on."""


def guide(axes: Axes, height: float, name: str, line: Line = "-", align: Literal["center", "top"] = "center") -> None:
    """Draws a grey horizontal line, labelled at its right end unless another panel follows to its right."""
    axes.axhline(height, color=QUIET, linestyle=line, linewidth=1, zorder=0)
    place = axes.get_subplotspec()
    if place is not None and place.is_last_col():
        axes.annotate(name, (1, height), (4, 0), ("axes fraction", "data"), "offset points", va=align, fontsize=11)


def expert_key(figure: Figure, experts: int) -> None:
    """Draws a key above the figure: the colour and dash of every expert. No key if these repeat (over 32 experts)."""
    from matplotlib.lines import Line2D

    if experts > len(DASHES) * len(palette.COLOURS):
        return
    columns = min(experts, len(palette.COLOURS))
    by_column = [e for column in range(columns) for e in range(column, experts, columns)]  # a legend's order
    handles = [Line2D([], [], color=palette.colour(e), linestyle=dash(e), linewidth=3) for e in by_column]
    figure.legend(
        handles,
        [str(e) for e in by_column],
        title="expert",
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        fontsize=11,
        handlelength=1.4 if experts <= columns else 2.2,
        columnspacing=1.2 if experts <= columns else 0.9,
    )


def width_of(panels: int, experts: int) -> float:
    """The width in inches for this many panels side by side, with the key of the experts above them."""
    return max(3.3 * panels + 0.9, 6 if experts <= len(palette.COLOURS) else 7.5)


def short(name: str) -> str:
    """A name as a label; the middle of a long name is left out, because names differ mostly at their ends."""
    shown = plain(name)
    return shown if len(shown) <= 28 else f"{shown[:13]}…{shown[-14:]}"


def dash(expert: int) -> Line:
    return DASHES[expert // len(palette.COLOURS) % len(DASHES)]


def load_matplotlib() -> None:
    """Imports matplotlib, even if ``MPLBACKEND`` names a missing backend: figures for files need no backend."""
    if "matplotlib" in sys.modules:
        return
    wish = os.environ.pop("MPLBACKEND", None)
    try:
        matplotlib = import_module("matplotlib")
    finally:
        if wish is not None:
            os.environ["MPLBACKEND"] = wish
    if wish:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = wish


def figure(width: float, height: float) -> Figure:
    """An empty white figure, width × height in inches."""
    load_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def quieten(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=11)
    axes.xaxis.label.set_fontsize(12)
    axes.yaxis.label.set_fontsize(12)


def plain(text: str) -> str:
    """``text`` as a literal label on one line: no mathematics between dollar signs, no control characters.

    Matplotlib leaves a label that begins with an underscore out of the legend; a space in front of it prevents this.
    """
    shown = printable(text.replace("\n", " ").replace("\t", " ")).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def dot(x: Array) -> str:
    """The marker of a curve: a dot if the curve is a single point, which would be invisible without it; else none."""
    return "o" if len(x) == 1 else ""


def in_percent(value: float, _: object) -> str:
    return f"{100 * value:g}%"


def in_thousands(value: float, _: object) -> str:
    """1500 → 1.5k, 2000000 → 2M: the label of a tick."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
