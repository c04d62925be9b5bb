"""Every figure of a run: how the loss fell, and how the work is shared among the experts.

Each function takes the rows of ``metrics.jsonl`` (or a load, as ``routing_trace.load`` returns it) and returns a
matplotlib ``Figure``; ``save`` writes it. Figures are made without pyplot, so they need no screen, and no window has to
be closed. A notebook displays them after ``%matplotlib inline``.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minimoe.core import files
from minimoe.core.arrays import Array, underflow_is_right
from minimoe.core.errors import UserError
from minimoe.draw import figure_parts, palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
"""Lines of ``metrics.jsonl``, as dictionaries."""

TRAINING, VALIDATION = palette.COLOURS[0], palette.COLOURS[5]
AUXILIARY = {"balance": 2, "importance": 3, "load": 1, "z": 7}  # the place of each in the palette

PANELS = 4
"""The largest number of layers that are drawn; for a deeper model, the first, the last and some in between."""
POINTS = 60
"""The largest number of points of a curve of shares."""
REACH = 0.01
"""A smoothed loss is a mean over this fraction of the run before the step, and the same fraction after it."""


def loss_curves(metrics: Rows) -> Figure:
    """Training and validation loss in nats per token over the tokens seen; below, a mixture's auxiliary losses.

    Raises:
        UserError: there are no rows.
    """
    tokens, loss = _column(metrics, "tokens"), _column(metrics, "loss")
    if len(metrics[0]["load"][0]) > 1:
        figure = figure_parts.figure(8, 6)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.3))
        _draw_auxiliary(bottom, tokens, metrics)
    else:  # dense: no router, and nothing to balance
        figure = figure_parts.figure(8, 4.2)
        top = bottom = figure.subplots()

    top.plot(tokens, loss, color=TRAINING, alpha=0.3, linewidth=0.8)
    smoothed = smooth(loss)
    label = f"training: {smoothed[-1]:.2f} at the end, smoothed"
    top.plot(tokens, smoothed, color=TRAINING, linewidth=2, marker=figure_parts.dot(loss), label=label)
    evaluated = [row for row in metrics if "val_loss" in row]
    if evaluated:
        x, y = _column(evaluated, "tokens"), _column(evaluated, "val_loss")
        top.plot(x, y, "o-", color=VALIDATION, linewidth=1, markersize=6, label=f"validation: {y[-1]:.2f} at the end")
    top.set_ylabel("loss (nats per token)")
    top.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, handlelength=1.2)
    bottom.set_xlabel("tokens seen")
    bottom.xaxis.set_major_formatter(figure_parts.in_thousands)
    for axes in (top, bottom):
        figure_parts.quieten(axes)
        axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    return figure


def _draw_auxiliary(axes: Axes, tokens: Array, metrics: Rows) -> None:
    for name, place in AUXILIARY.items():
        mean = np.array([np.mean(row["auxiliary"][name]) for row in metrics])
        colour = palette.COLOURS[place]
        axes.plot(tokens, smooth(mean), color=colour, linewidth=2, marker=figure_parts.dot(mean), label=name)
    axes.set_yscale("symlog", linthresh=0.1, linscale=0.5)
    axes.set_yticks([0, 0.1, 1, 10], ["0", "0.1", "1", "10"])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("auxiliary losses\n(mean of layers)")
    axes.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, handlelength=1.2)


def expert_load(load: Array, title: str = "Load of each expert, relative to its fair share") -> Figure:
    """A heat map of load (L, E), layers × experts: 1 is the fair share 1/E; all loads of 2 or more look the same.

    Raises:
        UserError: ``load`` is not a matrix of shares.
    """
    figure_parts.load_matplotlib()
    from matplotlib.colors import LinearSegmentedColormap

    load = np.asarray(load)
    if load.ndim != 2 or not np.allclose(load.sum(1), 1, atol=1e-3):
        raise UserError(
            f"A load of shape {load.shape} is not a matrix with rows that sum to 1; give what routing_trace.load "
            "returns."
        )
    layers, experts = load.shape
    ratio = load * experts
    figure = figure_parts.figure(min(max(2.5 + 0.7 * experts, 6), 14), 1.9 + 0.5 * min(layers, 16))
    axes = figure.subplots()
    ends = palette.COLOURS[0], "#FFFFFF", palette.COLOURS[5]
    colours = LinearSegmentedColormap.from_list("load", ends, N=257)  # odd, so that the middle is white
    image = axes.imshow(ratio, colours, vmin=0, vmax=2, aspect="auto")
    if experts <= 16:
        for (layer, expert), value in np.ndenumerate(ratio):
            red, green, blue, _ = (round(255 * part) for part in image.to_rgba(value))
            ink = palette.ink(f"#{red:02X}{green:02X}{blue:02X}")
            axes.text(expert, layer, f"{value:.2f}", color=ink, ha="center", va="center")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_xticks(range(0, experts, 1 + experts // 17))
    axes.set_yticks(range(0, layers, 1 + layers // 17))
    axes.set_title(title, fontsize=13, loc="left", pad=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, label="load / fair share", extend="max" if ratio.max() > 2 else "neither")
    bar.outline.set_visible(False)
    return figure


def load_over_time(metrics: Rows) -> Figure:
    """The share of every expert over the steps of a run, one panel per layer.

    Raises:
        UserError: there are no rows.
    """
    steps, shares = _shares(metrics)
    layers = _some(shares.shape[1])
    figure = figure_parts.figure(figure_parts.width_of(len(layers), shares.shape[2]), 3.6)
    panels = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    _draw_shares(panels, steps, shares, layers)
    panels[0].set_ylabel("share of assignments")
    figure_parts.expert_key(figure, shares.shape[2])
    return figure


def experts(metrics: Rows, load_by_domain: Mapping[str, Array], first_layer: int = 0) -> Figure:
    """The share of every expert: above, over the steps; below, by domain after training. One column per layer.

    The lower row is Figure 7 of Jiang et al. 2024, arXiv 2401.04088. ``load_by_domain`` is what
    ``routing_trace.load_by_domain`` returns: loads (L, E) by name. ``first_layer`` is the number of the first layer
    with a router, if the layers before it are dense.

    Raises:
        UserError: there are no rows, or no domain.
    """
    if not load_by_domain:
        raise UserError("There is no domain to draw: give at least one text by name.")
    steps, shares = _shares(metrics)
    layers = _some(shares.shape[1])
    width = figure_parts.width_of(len(layers), shares.shape[2])
    longest = max(len(figure_parts.short(name)) for name in load_by_domain)
    columns = min(len(load_by_domain), max(1, int(width / (0.6 + 0.1 * longest))))
    figure = figure_parts.figure(width, 6.8 + 0.25 * (math.ceil(len(load_by_domain) / columns) - 1))
    above, below = figure.subplots(2, len(layers), sharey="row", squeeze=False)
    _draw_shares(above, steps, shares, layers, first_layer)
    above[0].set_ylabel("share of assignments\nin training")
    _draw_domains(below, load_by_domain, layers)
    below[0].set_ylabel("share of assignments\nby text")
    figure_parts.expert_key(figure, shares.shape[2])
    names = below[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=columns, frameon=False, fontsize=11)
    return figure


def collapse(metrics_with: Rows, metrics_without: Rows) -> Figure:
    """The same training run with auxiliary losses (left) and without (right), one row per layer.

    Raises:
        UserError: one of the two has no rows.
    """
    runs = {"with auxiliary losses": _shares(metrics_with), "without auxiliary losses": _shares(metrics_without)}
    layers = _some(min(shares.shape[1] for _, shares in runs.values()))
    figure = figure_parts.figure(9.5, 1.4 + 1.9 * len(layers))
    columns = figure.subplots(len(layers), 2, sharex="col", sharey=True, squeeze=False).T
    for panels, (title, (steps, shares)) in zip(columns, runs.items(), strict=True):
        _draw_shares(panels, steps, shares, layers)
        experts = shares.shape[2]
        final = shares[-math.ceil(len(shares) / 10) :].mean(0)  # (L, E)  over the last tenth of the run
        for axes, layer in zip(panels, layers, strict=True):
            idle = int((final[layer] < 0.5 / experts).sum())
            axes.set_title(f"layer {layer}: {idle} of {experts} experts end below half", fontsize=11)
            axes.label_outer()
        panels[0].annotate(title, (0.5, 1), (0, 28), "axes fraction", "offset points", ha="center", fontsize=14)
    figure.supylabel("share of assignments", fontsize=12)
    figure_parts.expert_key(figure, experts)
    return figure


@underflow_is_right
def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure as PNG, SVG or PDF, by the ending of ``path``; a reader sees the whole new file or the old one.

    Raises:
        UserError: ``path`` has another ending, or the folder is missing or cannot be written to.
    """
    path = files.user_path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg", "pdf"):
        raise UserError(f"A figure cannot be saved as {path.name!r}: end the name in .png, .svg or .pdf.")
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # the drawn box says the same
        figure.savefig(content, format=kind, dpi=120)
    files.write_atomically(path, content.getvalue())


def smooth(values: Array) -> Array:
    """Each value (S,) becomes the mean of its neighbours on both sides and itself, so that the curve does not lag."""
    reach = np.ones(1 + 2 * round(REACH * len(values)))
    middle = slice(len(reach) // 2, len(reach) // 2 + len(values))
    means: Array = np.convolve(values, reach)[middle] / np.convolve(np.ones(len(values)), reach)[middle]
    return means


def _shares(metrics: Rows) -> tuple[Array, Array]:
    """The steps (P,) and loads (P, L, E) of the rows, as P ≤ ``POINTS`` points, each the mean of consecutive steps.

    The load of a single batch is mostly noise.
    """
    steps = _column(metrics, "step")
    load = np.array([row["load"] for row in metrics])
    starts = np.arange(0, len(steps), math.ceil(len(steps) / POINTS))
    lengths = np.diff([*starts, len(steps)])
    return np.add.reduceat(steps, starts) / lengths, np.add.reduceat(load, starts) / lengths[:, None, None]


def _draw_shares(
    panels: Sequence[Axes], steps: Array, shares: Array, layers: Sequence[int], first_layer: int = 0
) -> None:
    """Draws the share of every expert (P, L, E) over the steps (P,), one panel per layer."""
    fair = 1 / shares.shape[2]
    for axes, layer in zip(panels, layers, strict=True):
        figure_parts.guide(axes, fair / 2, "half", "--", "top")
        figure_parts.guide(axes, fair, "fair")
        if 2 * fair < 1:
            figure_parts.guide(axes, fair * 2, "double", "--")
        for expert in range(shares.shape[2]):
            axes.plot(
                steps,
                shares[:, layer, expert],
                color=palette.colour(expert),
                linestyle=figure_parts.dash(expert),
                linewidth=1.8,
                marker=figure_parts.dot(steps),
            )
        axes.set_title(f"layer {first_layer + layer}", fontsize=13)
        axes.set_xlabel("step")
        axes.set_ylim(0, min(1.02, max(2.4 * fair, 1.05 * float(shares.max()))))
        axes.yaxis.set_major_formatter(figure_parts.in_percent)
        axes.xaxis.set_major_formatter(figure_parts.in_thousands)
        axes.locator_params(axis="x", nbins=4, integer=True)
        if len(steps) == 1:
            axes.set_xticks(steps)
        figure_parts.quieten(axes)


def _draw_domains(panels: Sequence[Axes], load_by_domain: Mapping[str, Array], layers: Sequence[int]) -> None:
    """Draws one panel per layer, with one group of bars per expert: its share in each domain, from loads (L, E)."""
    figure_parts.load_matplotlib()
    from matplotlib import colormaps

    # dark to light, and unlike the colours of the experts, because each of these bars is a text
    colours = colormaps["bone"](0.05 + 0.75 * (np.arange(len(load_by_domain)) + 0.5) / len(load_by_domain))
    width = 0.84 / len(load_by_domain)
    for axes, layer in zip(panels, layers, strict=True):
        for place, (name, load) in enumerate(load_by_domain.items()):
            experts = load.shape[1]
            x = np.arange(experts) + (place + 0.5) * width - 0.42
            axes.bar(x, load[layer], width, color=colours[place], label=figure_parts.short(name))
        figure_parts.guide(axes, 1 / experts, "fair")
        axes.set_xlabel("expert")
        axes.set_xticks(range(0, experts, 1 + experts // 10))
        axes.yaxis.set_major_formatter(figure_parts.in_percent)
        figure_parts.quieten(axes)


def _column(metrics: Rows, name: str) -> Array:
    if not metrics:
        raise UserError("There are no metrics to draw: train for at least one step.")
    return np.array([row[name] for row in metrics], np.float64)


def _some(layers: int) -> list[int]:
    """At most ``PANELS`` layers, evenly spread from the first to the last."""
    return sorted({round(layer) for layer in np.linspace(0, layers - 1, min(layers, PANELS)).tolist()})
