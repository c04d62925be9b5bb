"""The figure of a run that learns preferences: the margin of the rewards, and how likely the answers are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from minimoe.core.errors import UserError
from minimoe.draw import figure_parts, palette
from minimoe.draw.plots import smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHOSEN, REJECTED, MARGIN = palette.COLOURS[2], palette.COLOURS[5], palette.COLOURS[0]


def curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The margin of the rewards, and the log-probabilities of the answers, over the steps. Dots are held-out pairs.

    Args:
        rows: the lines of metrics.jsonl of a run that ``tuning.dpo`` made.

    Raises:
        UserError: there are no rows.
    """
    if not rows:
        raise UserError("there are no metrics to draw: take at least one step.")
    figure = figure_parts.figure(8, 3.4)
    left, right = figure.subplots(1, 2)
    _draw(left, rows, "margin", MARGIN, "margin")
    _draw(right, rows, "logp_chosen", CHOSEN, "chosen answer")
    _draw(right, rows, "logp_rejected", REJECTED, "rejected answer")
    left.set_ylabel("difference of the rewards")
    right.set_ylabel("log-probability (nats per answer)")
    for axes in (left, right):
        figure_parts.quieten(axes)
        axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
        axes.set_xlabel("step")
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0, handlelength=1.2)
    return figure


def _draw(axes: Axes, rows: Sequence[Mapping[str, Any]], name: str, colour: str, label: str) -> None:
    steps, values = (np.array([row[column] for row in rows], float) for column in ("step", name))
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(values), color=colour, linewidth=2, marker=figure_parts.dot(values), label=label)
    held_out = [row for row in rows if f"val_{name}" in row]
    axes.plot([row["step"] for row in held_out], [row[f"val_{name}"] for row in held_out], "o", color=colour)
