"""What all figures share: a white sheet, quiet axes, guide lines with names, and the experts' colours and dashes.

Made without pyplot, which keeps every figure in a global list: here a figure is a value like any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from minimoe.core.arrays import Array
from minimoe.core.errors import printable
from minimoe.draw import palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUIET = "#767676"  # lines that only guide; contrast 4.5 on white
Line: TypeAlias = Literal["-", "--", ":", "-."]
DASHES: tuple[Line, ...] = ("-", "--", ":", "-.")
"""The second eight experts have the colours of the first eight, dashed; the third, dotted; and so on."""


def guide(axes: Axes, height: float, name: str, line: Line = "-", align: Literal["center", "top"] = "center") -> None:
    """A quiet horizontal line, named at its right end if no other panel stands there."""
    axes.axhline(height, color=QUIET, linestyle=line, linewidth=1, zorder=0)
    place = axes.get_subplotspec()
    if place is not None and place.is_last_col():
        axes.annotate(name, (1, height), (4, 0), ("axes fraction", "data"), "offset points", va=align, fontsize=11)


def expert_key(figure: Figure, experts: int) -> None:
    """The colour and dash of every expert at the head of a figure; beyond 32 both repeat, and a key would not help."""
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
    """Inches for so many panels side by side, and for the key of the experts above them."""
    return max(3.3 * panels + 0.9, 6 if experts <= len(palette.COLOURS) else 7.5)


def short(name: str) -> str:
    """A name as a label, its middle left out if it is long: what is told apart stands at the ends."""
    shown = plain(name)
    return shown if len(shown) <= 28 else f"{shown[:13]}…{shown[-14:]}"


def dash(expert: int) -> Line:
    return DASHES[expert // len(palette.COLOURS) % len(DASHES)]


def figure(width: float, height: float) -> Figure:
    """An empty white figure, width × height in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def quieten(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=11)
    axes.xaxis.label.set_fontsize(12)
    axes.yaxis.label.set_fontsize(12)


def plain(text: str) -> str:
    """``text`` as a label that shows what it says: no mathematics between dollars, no control characters, one line.

    A label that begins with an underscore would be left out of the legend; a space in front of it brings it back.
    """
    shown = printable(text.replace("\n", " ").replace("\t", " ")).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def dot(x: Array) -> str:
    """The marker of a curve: none, but a run of a single step would be invisible without."""
    return "o" if len(x) == 1 else ""


def in_percent(value: float, _: object) -> str:
    return f"{100 * value:g}%"


def in_thousands(value: float, _: object) -> str:
    """1500 → 1.5k, 2000000 → 2M: the label of a tick."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
