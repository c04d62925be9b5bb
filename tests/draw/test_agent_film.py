"""The film of an agent: every step where it was made, in the colour of the skill that made it."""

import xml.etree.ElementTree as ET

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex

from minimoe.draw import agent_film, palette
from minimoe.draw.agent_film import EDGE, GAP, HEAD, SIDE, Scene

T, N = 4, 6
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def scene(rng: np.random.Generator) -> Scene:
    """Six episodes under two winds; the first ends after two steps."""
    position = rng.uniform(-2, 2, (T + 1, N, 2))
    alive = np.ones((T, N), bool)
    alive[2:, 0] = False
    position[2:, 0] = position[2, 0]
    return Scene("after <3> updates", position, rng.integers(4, size=(T, N)), alive, np.array([0, 1] * 3))


def test_every_step_that_was_taken_is_a_line_in_the_colour_of_its_skill(scene: Scene) -> None:
    figure = agent_film.paths([scene, scene])
    panels = figure.axes
    assert [axes.get_title() for axes in panels] == ["wind 0", "wind 1", "", ""]
    assert panels[2].get_ylabel() == "after <3> updates"
    for axes, wind in zip(panels, (0, 1, 0, 1), strict=True):
        (lines,) = (part for part in axes.collections if isinstance(part, LineCollection))
        expected = [(t, n) for n in range(N) if scene.wind[n] == wind for t in range(T) if scene.alive[t, n]]
        assert len(lines.get_segments()) == len(expected) == (10 if wind == 0 else 12)
        for segment, colour, (t, n) in zip(lines.get_segments(), lines.get_colors(), expected, strict=True):
            np.testing.assert_allclose(segment, scene.position[t : t + 2, n])
            assert to_hex(colour).upper() == palette.colour(int(scene.skill[t, n]))
    plt.close(figure)


def test_only_so_many_episodes_are_drawn(scene: Scene) -> None:
    figure = agent_film.paths([scene], per_wind=2)
    assert [len(axes.collections[0].get_segments()) for axes in figure.axes] == [6, 8]
    assert len(ET.fromstring(agent_film.animation([scene], per_wind=2).svg).findall(f"{SVG}svg/{SVG}polyline")) == 4
    plt.close(figure)


def test_the_moving_point_is_where_the_episode_was_at_each_step(scene: Scene) -> None:
    film = agent_film.animation([scene, scene])
    page = ET.fromstring(film.svg)
    panels = page.findall(f"{SVG}svg")
    points = [circle for panel in panels for circle in panel.findall(f"{SVG}circle")]
    order = [n for _ in range(2) for wind in (0, 1) for n in range(N) if scene.wind[n] == wind]
    assert len(points) == len(order) == 2 * N
    corners = [(GAP + column * (SIDE + GAP), HEAD + row * (SIDE + HEAD)) for row in range(2) for column in range(2)]
    assert [panel.get("viewBox") for panel in panels] == [f"{left} {top} {SIDE} {SIDE}" for left, top in corners]
    scale = SIDE / (2 * EDGE)
    for place, (circle, n) in enumerate(zip(points, order, strict=True)):
        row, column = place // N, int(scene.wind[n])
        x, y, fill = (moving.get("values", "").split(";") for moving in circle)
        left, top = GAP + column * (SIDE + GAP), HEAD + row * (SIDE + HEAD)
        np.testing.assert_allclose(
            np.array(x[: T + 1], float), left + (scene.position[:, n, 0] + EDGE) * scale, atol=0.06
        )
        np.testing.assert_allclose(
            np.array(y[: T + 1], float), top + (EDGE - scene.position[:, n, 1]) * scale, atol=0.06
        )
        assert x[T + 1 :] == [x[T]] * 3 and y[T + 1 :] == [y[T]] * 3, "it rests at the end"
        shown = [
            palette.colour(int(e)) if on else "#C8C8C8"
            for e, on in zip(scene.skill[:, n], scene.alive[:, n], strict=True)
        ]
        assert fill == [*shown, *["#C8C8C8"] * 3]
        assert len(x) == len(fill) + 1, "a colour holds between two places"
        assert {moving.get("dur") for moving in circle} == {"3.15s"}


def test_the_film_is_small_needs_no_script_and_shows_itself_in_a_notebook(scene: Scene) -> None:
    film = agent_film.animation([scene])
    assert film._repr_svg_() == film.svg
    assert "script" not in film.svg
    assert "after &lt;3&gt; updates" in film.svg
    assert repr(film) == "A film of 6 episodes, 4 steps each; a browser plays it."
    full = [
        scene._replace(
            position=np.zeros((13, 96, 2)),
            skill=np.zeros((12, 96), int),
            alive=np.ones((12, 96), bool),
            wind=np.arange(96) % 4,
        )
    ] * 3
    assert len(agent_film.animation(full).svg) < 80_000
