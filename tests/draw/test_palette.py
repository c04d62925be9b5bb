"""The colours of the experts: legible under any text, and apart for every kind of colour vision."""

import itertools

import numpy as np
import pytest

from minimoe.draw import palette

# Machado, Oliveira and Fernandes 2009, doi 10.1109/TVCG.2009.113: severity 1.0, on linear RGB.
VISION = {
    "all three cones": np.eye(3),
    "no red": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no green": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "no blue": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def linear(colour):
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
    """Linear RGB → a space where distance is difference to the eye (Ottosson 2020); black to white is 1."""
    to_cones = [
        [0.41222147, 0.53633254, 0.05144599],
        [0.2119035, 0.68069955, 0.10739696],
        [0.08830246, 0.28171884, 0.6299787],
    ]
    to_lab = [
        [0.21045426, 0.79361779, -0.00407205],
        [1.9779985, -2.42859221, 0.45059371],
        [0.02590404, 0.78277177, -0.80867577],
    ]
    return to_lab @ np.cbrt(to_cones @ np.clip(rgb, 0, 1))


def smallest_distance(colours, vision):
    seen = [oklab(np.array(VISION[vision]) @ linear(colour)) for colour in colours]
    return min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2))


def of_terminal(number):
    """What a terminal shows for one of its 256 colours: a cube of six levels from 16 on, then greys from 232 on."""
    if number >= 232:
        return "#" + 3 * f"{8 + 10 * (number - 232):02X}"
    levels = (0, 95, 135, 175, 215, 255)
    place = number - 16
    return "#" + "".join(f"{levels[i]:02X}" for i in (place // 36, place // 6 % 6, place % 6))


@pytest.mark.parametrize("vision", VISION)
def test_any_two_experts_differ_for_every_kind_of_colour_vision(vision):
    assert smallest_distance(palette.COLOURS, vision) > 0.10
    assert smallest_distance(map(of_terminal, palette.TERMINAL), vision) > 0.08


def test_moved_colours_are_further_apart_than_okabe_and_itos_with_grey():
    """The reason for moving them: the usual grey, 999999, cannot be told from their purple without green cones."""
    theirs = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")
    assert smallest_distance(theirs, "no green") < 0.02


def test_contrast_is_that_of_wcag():
    assert palette.contrast("#000000", "#FFFFFF") == pytest.approx(21)
    assert palette.contrast("#FFFFFF", "#767676") == pytest.approx(4.54, abs=0.005)  # its best-known example
    assert palette.contrast("#808080", "#808080") == 1


def test_text_on_every_colour_has_enough_contrast():
    for expert, number in enumerate(palette.TERMINAL):
        ink = palette.ink(palette.colour(expert))
        assert palette.contrast(palette.colour(expert), ink) > 4.5
        assert palette.contrast(of_terminal(number), ink) > 4.5


def test_ink_is_legible_on_any_grey():
    assert min(palette.contrast(grey, palette.ink(grey)) for grey in (f"#{3 * f'{v:02X}'}" for v in range(256))) > 4.5


def test_colours_begin_again_after_the_last():
    assert [palette.colour(e) for e in (0, 7, 8, 15)] == [palette.COLOURS[i] for i in (0, 7, 0, 7)]
