"""Checks of lesson 04: RoPE."""

from __future__ import annotations

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure
from minimoe.layers import rope
from minimoe.layers.rope import Rotation


def slow_pairs(answer: Answer) -> Report:
    """(head_width, theta, context) → the number of pairs that do not come full circle."""
    return first_failure(_slow_pairs(answer, *case) for case in ((32, 1e4, 128), (128, 1e6, 32_768), (8, 1e4, 10**6)))


def _slow_pairs(answer: Answer, head_width: int, theta: float, context: int) -> Report:
    turns = context * theta ** (-2.0 * np.arange(head_width // 2) / head_width) / (2 * np.pi)
    slow = int((turns < 1).sum())
    hints = {
        "these are the pairs that do come full circle; count the others.": len(turns) - slow,
        "one radian is not a full turn: compare the angle with 2π.": int((2 * np.pi * turns < 1).sum()),
        "this counts channels, but a pair has two of them.": 2 * slow,
        "half a turn is not a full turn: compare the angle with 2π, not with π.": int((2 * turns < 1).sum()),
    }
    return values(
        answer,
        (head_width, theta, context),
        {"pairs": slow},
        mistakes={"pairs": {hint: wrong for hint, wrong in hints.items() if wrong != slow}},
    )


def interleaved(answer: Answer) -> Report:
    """(cos, sin, x) → y, with neighbouring channels as pairs."""
    rng = np.random.default_rng(4)
    T, C = 5, 6
    x = rng.standard_normal((T, C))
    rotation = rope.init(np.arange(3, 3 + T), C, dtype=np.float64)
    cos, sin = rotation.cos[:, 0], rotation.sin[:, 0]  # (T, C/2)
    in_halves = _turn(rotation, x[:, _to_halves(C)])
    there_and_back = np.argsort(_to_halves(C))
    opposite = Rotation(rotation.cos, -rotation.sin)
    return values(
        answer,
        (cos, sin, x),
        {"y": in_halves[:, there_and_back]},
        sizes={"T": T, "C": C},
        mistakes={
            "y": {
                "this pairs channel j with channel j + C/2, but here a channel is paired with its neighbour.": _turn(
                    rotation, x
                ),
                "the values are right, but they are in halves: put the two members of each pair side by side.": (
                    in_halves
                ),
                "this turns in the wrong direction: look at the signs of the two sines.": _turn(
                    opposite, x[:, _to_halves(C)]
                )[:, there_and_back],
            }
        },
    )


def to_halves(answer: Answer) -> Report:
    """(W, heads) → the columns of W in the order that splits pairs by halves."""
    rng = np.random.default_rng(4)
    D, H, C = 5, 3, 8
    W = rng.standard_normal((D, H * C))
    pairs = W.reshape(D, H, C // 2, 2)
    return values(
        answer,
        (W, H),
        {"W": pairs.swapaxes(2, 3).reshape(W.shape)},
        sizes={"D": D, "H·C": H * C},
        mistakes={
            "W": {
                "this goes the other way, from halves to interleaved pairs: which of the two axes has length 2?": (
                    W.reshape(D, H, 2, C // 2).swapaxes(2, 3).reshape(W.shape)
                ),
                "this reorders all columns at once, across the heads, but every head keeps its own C columns.": W[
                    :, _to_halves(H * C)
                ],
                "nothing has moved: a reshape alone does not change the order.": W,
            }
        },
    )


def learned_speeds_backward(answer: Answer) -> Report:
    """(speed, x, dy) → dx, dspeed."""
    rng = np.random.default_rng(4)
    T, C = 5, 6
    x, dy = rng.standard_normal((2, T, C))
    speed = rng.uniform(0.2, 1.0, C // 2)

    def rotation(speed: Array) -> Rotation:
        angle = np.arange(T)[:, None, None] * speed
        return Rotation(np.cos(angle), np.sin(angle))

    def loss(x: Array, speed: Array) -> Array:
        return (_turn(rotation(speed), x) * dy).sum()

    y1, y2 = np.split(_turn(rotation(speed), x), 2, axis=-1)
    dy1, dy2 = np.split(dy, 2, axis=-1)
    t = np.arange(T)[:, None]
    return gradients(
        answer,
        (speed, x, dy),
        loss,
        {"x": x, "speed": speed},
        sizes={"T": T, "C": C, "C/2": C // 2},
        mistakes={
            "dx": {"this is the forward rotation of dy: a gradient goes back through its transpose.": _turn(
                rotation(speed), dy
            )},
            "dspeed": {
                "this is the gradient with respect to the angles. The angle is t·ω: where is the t?": (
                    dy2 * y1 - dy1 * y2
                ).sum(0),
                "y₁ depends on the angle too, not only y₂.": (t * dy2 * y1).sum(0),
                "y₂ depends on the angle too, not only y₁.": -(t * dy1 * y2).sum(0),
                "both halves are there, but one has the wrong sign: what is the derivative of a cosine?": (
                    t * (dy2 * y1 + dy1 * y2)
                ).sum(0),
            },
        },
    )  # fmt: skip


def _turn(rotation: Rotation, x: Array) -> Array:
    """x (T, C) → (T, C), by the package's rotation."""
    return rope.forward(rotation, x[None, :, None])[0, :, 0]


def _to_halves(channels: int) -> Array:
    """Which interleaved channel moves to each place: 0, 2, 4, …, 1, 3, 5, …"""
    return np.concatenate([np.arange(0, channels, 2), np.arange(1, channels, 2)])
