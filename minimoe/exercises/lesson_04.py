"""Checks of lesson 04: RoPE."""

from __future__ import annotations

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure
from minimoe.layers import rope
from minimoe.layers.rope import Rotation


def slow_pairs(answer: Answer) -> Report:
    """(head_width, theta, context) → the number of pairs that do not complete a full turn."""
    cases = (128, 1e6, 32_768), (32, 1e4, 128), (8, 1e4, 10**6), (16, 1e2, 1)  # in the last two, none and all are slow
    return first_failure(_slow_pairs(answer, *case) for case in cases)


def _slow_pairs(answer: Answer, head_width: int, theta: float, context: int) -> Report:
    pair = np.arange(head_width // 2)
    turns = context * theta ** (-2.0 * pair / head_width) / (2 * np.pi)
    slow = int((turns < 1).sum())
    hints = {
        "these are the pairs that complete a full turn; count the others.": len(turns) - slow,
        "one radian is not a full turn: compare the angle with 2π.": int((2 * np.pi * turns < 1).sum()),
        "this counts channels, but a pair has two of them.": 2 * slow,
        "half a turn is not a full turn: compare the angle with 2π, not with π.": int((2 * turns < 1).sum()),
        "the exponent is −2j/C, not −j/C.": int((context * theta ** (-1.0 * pair / head_width) < 2 * np.pi).sum()),
    }
    to_theta = int((context * theta ** (-pair / pair[-1]) < 2 * np.pi).sum())
    if to_theta == slow:  # a case that tells these two apart
        from_one = int((context * theta ** (-2.0 * (pair + 1) / head_width) < 2 * np.pi).sum())
        hints["the pairs are numbered from 0: pair 0 rotates by 1 radian per token."] = from_one
    else:
        hints["the exponent is −2j/C, so the last pair does not quite reach 1/θ."] = to_theta
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
    tiled = np.tile(cos, 2), np.tile(sin, 2)  # (T, C)
    y = in_halves[:, there_and_back]
    overwritten = y.copy()
    overwritten[:, 1::2] = x[:, 1::2] * cos + y[:, 0::2] * sin
    one_sign = y.copy()
    one_sign[:, 0::2] = x[:, 0::2] * cos + x[:, 1::2] * sin
    turned = np.repeat(sin, 2, axis=1) * x + np.repeat(cos, 2, axis=1) * _quarter_turn(x)
    return values(
        answer,
        (cos, sin, x),
        {"y": y},
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
                "pair j has the channels 2j and 2j + 1, so both of them need cosine and sine j.": (
                    x * tiled[0] + _quarter_turn(x) * tiled[1]
                ),
                "one of the two sines has a minus: which one?": one_sign,
                "the cosine and the sine are swapped.": turned,
                "the second line must use the first member of the pair as it was, not the result of the first line.": (
                    overwritten
                ),
            }
        },
    )


def to_halves(answer: Answer) -> Report:
    """(W, heads) → the columns of W in the order that splits pairs by halves."""
    return first_failure(_columns(answer, *case) for case in ((5, 3, 8), (7, 2, 6)))


def _columns(answer: Answer, D: int, H: int, C: int) -> Report:
    rng = np.random.default_rng(4)
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
                "the first members of all pairs must come before the second members.": (
                    pairs[..., ::-1].swapaxes(2, 3).reshape(W.shape)
                ),
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
                "the signs are the wrong way round: a growing angle moves y₁ by −y₂ and y₂ by +y₁.": (
                    t * (dy1 * y2 - dy2 * y1)
                ).sum(0),
                "this uses x where y belongs: the rotated pair moves along the circle from where it is, not from x.": (
                    t * (dy2 * x[:, : C // 2] - dy1 * x[:, C // 2 :])
                ).sum(0),
                "the positions are 0, 1, 2, …: the first token is at position 0.": (
                    (t + 1) * (dy2 * y1 - dy1 * y2)
                ).sum(0),
            },
        },
    )  # fmt: skip


def _turn(rotation: Rotation, x: Array) -> Array:
    """x (T, C) → (T, C), by the package's rotation."""
    return rope.forward(rotation, x[None, :, None])[0, :, 0]


def _quarter_turn(x: Array) -> Array:
    """x (T, C) with neighbouring pairs (a, b) → (−b, a)."""
    return np.stack([-x[:, 1::2], x[:, 0::2]], axis=-1).reshape(x.shape)


def _to_halves(channels: int) -> Array:
    """Which interleaved channel moves to each place: 0, 2, 4, …, 1, 3, 5, …"""
    return np.concatenate([np.arange(0, channels, 2), np.arange(1, channels, 2)])
