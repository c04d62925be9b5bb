"""Films of an agent of many skills: where its points went, step by step, in the colour of the skill in charge.

    paths([Scene("after learning", position, skill, alive, wind)])         a figure with every path
    animation([Scene("after learning", position, skill, alive, wind)])     the same, moving, as an SVG

The animation needs no script: the elements of the SVG carry their own times, so any browser plays it.

Lesson: lessons/64_an_agent_of_many_skills.ipynb
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minimoe.core.arrays import Array
from minimoe.draw import palette
from minimoe.draw.lesson_figures import INK, QUIET

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EDGE = 2.6
"""Half the side of a panel, in units of the world."""
TARGET = 0.5
"""The radius of the disc that the points want to reach."""
SIDE, GAP, HEAD = 150, 12, 34
"""Pixels: the side of a panel of the animation, the gap between panels, and the space above each row."""
STEP = 0.45
"""Seconds per step of the animation; it rests for three steps at its end."""
NOBODY = "#C8C8C8"
"""The colour of a point that has arrived, or whose time is over."""


class Scene(NamedTuple):
    """N episodes of at most T steps, for one row of panels."""

    title: str
    position: Array  # (T + 1, N, 2)
    skill: Array  # (T, N)  who was in charge of each step
    alive: Array  # (T, N)  bool: the step was taken
    wind: Array  # (N,)  one panel for each


class Film(NamedTuple):
    """An animation that a notebook shows."""

    svg: str
    description: str

    def _repr_svg_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return self.description


def paths(scenes: Sequence[Scene], per_wind: int = 12) -> Figure:
    """One row per scene and one column per wind, with the first ``per_wind`` episodes of that wind in each panel."""
    import matplotlib.pyplot as plt
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle

    winds = _winds(scenes)
    size = (1.75 * len(winds) + 0.3, 1.75 * len(scenes) + 0.5)
    figure, panels = plt.subplots(len(scenes), len(winds), figsize=size, squeeze=False)
    for row, scene in zip(panels, scenes, strict=True):
        for axes, wind in zip(row, winds, strict=True):
            axes.add_patch(Circle((0, 0), TARGET, color="#E6E6E6", zorder=0))
            lines, colours = [], []
            for n in _episodes(scene, wind, per_wind):
                steps = np.flatnonzero(scene.alive[:, n])
                lines += [scene.position[t : t + 2, n] for t in steps]
                colours += [palette.colour(int(scene.skill[t, n])) for t in steps]
                axes.plot(*scene.position[0, n], "o", color=INK, markersize=2.5)
            axes.add_collection(LineCollection(lines, colors=colours, linewidths=1.6))
            axes.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), xticks=[], yticks=[], aspect="equal")
            axes.grid(False)
            axes.spines[:].set_visible(True)
        row[0].set_ylabel(scene.title, fontsize=9)
    for axes, wind in zip(panels[0], winds, strict=True):
        axes.set_title(f"wind {wind}", fontsize=10)
    skills = sorted({int(e) for scene in scenes for e in scene.skill[scene.alive].tolist()})
    handles = [Line2D([], [], color=palette.colour(e), label=f"skill {e}") for e in skills]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(skills), fontsize=9)
    return figure


def animation(scenes: Sequence[Scene], per_wind: int = 6) -> Film:
    """The same panels as ``paths``, in which each episode is a moving point, coloured by the skill in charge."""
    winds = _winds(scenes)
    width = len(winds) * (SIDE + GAP) + GAP
    height = len(scenes) * (SIDE + HEAD) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12"><rect width="{width}" height="{height}" fill="white"/>'
    ]
    count = 0
    for row, scene in enumerate(scenes):
        for column, wind in enumerate(winds):
            left, top = GAP + column * (SIDE + GAP), HEAD + row * (SIDE + HEAD)
            title = f"wind {wind}: {scene.title}" if column == 0 else f"wind {wind}"
            parts.append(
                f'<text x="{left}" y="{top - 8}" fill="{INK}">{escape(title)}</text>'
                f'<rect x="{left}" y="{top}" width="{SIDE}" height="{SIDE}" fill="none" stroke="{QUIET}"/>'
                f'<circle cx="{_pixel(0, left)}" cy="{_pixel(0, top)}" r="{TARGET * SIDE / (2 * EDGE):.1f}" '
                f'fill="#E6E6E6"/>'
            )
            chosen = _episodes(scene, wind, per_wind)
            # An inner SVG cuts off what lies beyond its panel, and keeps the coordinates of the page.
            parts.append(
                f'<svg x="{left}" y="{top}" width="{SIDE}" height="{SIDE}" viewBox="{left} {top} {SIDE} {SIDE}">'
            )
            parts += [_point(scene, int(n), left, top) for n in chosen]
            parts.append("</svg>")
            count += len(chosen)
    steps = len(scenes[0].skill)
    return Film("".join([*parts, "</svg>"]), f"A film of {count} episodes, {steps} steps each; a browser plays it.")


def _point(scene: Scene, n: int, left: int, top: int) -> str:
    """One episode: its path in grey, and a point that moves along it."""
    T = len(scene.skill)
    x = [_pixel(value, left) for value in scene.position[:, n, 0].tolist()]
    y = [_pixel(-value, top) for value in scene.position[:, n, 1].tolist()]  # an SVG's y grows downwards
    colours = [
        palette.colour(int(e)) if alive else NOBODY
        for e, alive in zip(scene.skill[:, n].tolist(), scene.alive[:, n].tolist(), strict=True)
    ]
    rest = 3
    seconds = f'dur="{STEP * (T + rest):.2f}s" repeatCount="indefinite"'
    track = " ".join(f"{a},{b}" for a, b in zip(x, y, strict=True))

    def moving(name: str, values: list[str], discrete: str = "") -> str:
        # The last value is held while the film rests; T + rest intervals of equal length need no keyTimes.
        held = values + values[-1:] * (T + rest + 1 - len(values) - bool(discrete))
        return f'<animate attributeName="{name}" values="{";".join(held)}" {discrete}{seconds}/>'

    return (
        f'<polyline points="{track}" fill="none" stroke="#E0E0E0"/>'
        f'<circle cx="{x[0]}" cy="{y[0]}" r="3.5" fill="{colours[0]}">'
        + moving("cx", x)
        + moving("cy", y)
        + moving("fill", [*colours, NOBODY], 'calcMode="discrete" ')
        + "</circle>"
    )


def _pixel(value: float, start: int) -> str:
    return f"{start + (value + EDGE) * SIDE / (2 * EDGE):.1f}"


def _winds(scenes: Sequence[Scene]) -> list[int]:
    return sorted({int(wind) for scene in scenes for wind in scene.wind.tolist()})


def _episodes(scene: Scene, wind: int, most: int) -> Array:
    return np.flatnonzero(scene.wind == wind)[:most]
