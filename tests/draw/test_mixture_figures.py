"""Figures of mixtures: trust is visible as opacity on a line and as colour in a plane."""

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb

from minimoe.draw import figure_parts, mixture_figures, palette


def axes():
    return figure_parts.figure(3, 3).subplots()


def test_a_line_is_as_opaque_as_its_expert_is_trusted() -> None:
    x = np.array([0.0, 1.0, 2.0])
    trust = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    drawn = axes()
    mixture_figures.lines_by_trust(drawn, x, np.array([[0.0, 5.0], [1.0, 6.0], [2.0, 7.0]]), trust)
    assert [line.get_color() for line in drawn.lines] == [to_rgb(palette.colour(e)) for e in range(2)]
    for e, pieces in enumerate(drawn.collections):
        np.testing.assert_allclose(pieces.get_colors()[:, :3], [to_rgb(palette.colour(e))] * 2)
        np.testing.assert_allclose(pieces.get_colors()[:, 3], [[0.75, 0.25], [0.25, 0.75]][e])
        np.testing.assert_allclose(pieces.get_segments()[1], [[1, 1 + 5 * e], [2, 2 + 5 * e]])


def test_a_plane_has_the_colours_of_those_who_are_trusted() -> None:
    trust = np.array([[[1.0, 0.0], [0.5, 0.5]]] * 2)
    drawn = axes()
    mixture_figures.plane_by_trust(drawn, np.array([0.0, 1.0]), np.array([3.0, 4.0]), trust, strength=1)
    one, other = (np.array(to_rgb(palette.colour(e))) for e in range(2))
    np.testing.assert_allclose(drawn.images[0].get_array()[0], [one, (one + other) / 2], atol=0.005)


def test_a_border_lies_between_two_classes() -> None:
    x, y = np.linspace(0, 3, 31), np.linspace(0, 2, 21)
    winner = np.broadcast_to((x > 1.51).astype(int), (21, 31))
    drawn = axes()
    mixture_figures.borders(drawn, x, y, winner)
    (found,) = drawn.collections
    np.testing.assert_allclose(found.get_paths()[0].vertices[:, 0], 1.55, atol=0.06)


@pytest.mark.parametrize("colours", [None, ["#112233", "#445566"]])
def test_every_cloud_carries_its_name_in_its_middle(colours: list[str] | None) -> None:
    points = np.array([[0.0, 0.0], [2.0, 2.0], [1.0, 1.0], [7.0, 7.0], [9.0, 9.0]])
    drawn = axes()
    mixture_figures.clouds(drawn, points, np.array([0, 0, 0, 1, 1]), ["i", "ɑ"], colours)
    assert [(text.get_text(), text.get_position()) for text in drawn.texts] == [("i", (1, 1)), ("ɑ", (8, 8))]
    assert [len(dots.get_offsets()) for dots in drawn.collections] == [3, 2]
    if colours:  # the dots have them; the names are dark, so that they can be read on the dots
        assert [to_hex(dots.get_facecolor()[0]) for dots in drawn.collections] == colours
        assert {text.get_color() for text in drawn.texts} == {mixture_figures.INK}
