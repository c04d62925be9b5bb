"""The lessons' drawings: a matrix shows its numbers and their signs, an equation its parts from left to right."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from minimoe.draw import lesson_figures, palette


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(2.0, 1, "2"), (-0.5, 1, "−0.5"), (1.25, 2, "1.25"), (1.204, 2, "1.2"), (-0.04, 1, "0"), (30.0, 0, "30")],
)
def test_a_number_is_as_short_as_it_can_be(value: float, digits: int, text: str) -> None:
    assert lesson_figures.number(value, digits) == text


def test_a_matrix_shows_every_number_but_those_that_are_none() -> None:
    _, axes = plt.subplots()
    lesson_figures.matrix(axes, np.array([[1.0, -2.0], [np.nan, 0.5]]), "W")
    assert [text.get_text() for text in axes.texts] == ["1", "−2", "0.5"]
    assert axes.get_title() == "W"
    plt.close()


def test_colours_tell_the_sign_and_the_largest_value_has_the_strongest() -> None:
    _, axes = plt.subplots()
    lesson_figures.matrix(axes, np.array([-3.0, 0.0, 3.0]))
    (image,) = axes.images
    negative, zero, positive = (image.to_rgba(value)[:3] for value in (-3.0, 0.0, 3.0))
    np.testing.assert_allclose(negative, to_rgb(palette.COLOURS[0]), atol=0.01)
    np.testing.assert_allclose(zero, 1, atol=0.01)
    np.testing.assert_allclose(positive, to_rgb(palette.COLOURS[5]), atol=0.01)
    plt.close()


def test_an_equation_stands_from_left_to_right_and_its_cells_have_one_size() -> None:
    figure = lesson_figures.equation(("x", np.ones(3)), "@", ("W", np.ones((3, 2))), "=", ("y", np.ones(2)))
    figure.canvas.draw()
    assert [axes.get_title() or axes.texts[0].get_text() for axes in figure.axes] == ["x", "@", "W", "=", "y"]
    assert [axes.get_position().x0 for axes in figure.axes] == sorted(axes.get_position().x0 for axes in figure.axes)
    cells = [
        axes.get_position().width * figure.get_figwidth() / columns
        for axes, columns in zip(figure.axes[::2], (3, 2, 2), strict=True)
    ]
    assert max(cells) < 1.2 * min(cells)
    plt.close(figure)
