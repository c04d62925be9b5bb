"""Wrong answers to the exercises of lesson 04, each with words that its hint must hold."""

import numpy as np

from minimoe.exercises import lesson_04 as check


def turns(head_width, theta, context):
    return context * theta ** (-2 * np.arange(head_width // 2) / head_width)


def radians_for_turns(head_width, theta, context):
    return int((turns(head_width, theta, context) < 1).sum())


def the_fast_ones(head_width, theta, context):
    return int((turns(head_width, theta, context) >= 2 * np.pi).sum())


def channels_for_pairs(head_width, theta, context):
    return 2 * int((turns(head_width, theta, context) < 2 * np.pi).sum())


def halves(cos, sin, x):
    half = x.shape[1] // 2
    x1, x2 = x[:, :half], x[:, half:]
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=1)


def left_in_halves(cos, sin, x):
    even, odd = x[:, 0::2], x[:, 1::2]
    return np.concatenate([even * cos - odd * sin, odd * cos + even * sin], axis=1)


def the_other_way_round(cos, sin, x):
    y = np.empty_like(x)
    y[:, 0::2] = x[:, 0::2] * cos + x[:, 1::2] * sin
    y[:, 1::2] = x[:, 1::2] * cos - x[:, 0::2] * sin
    return y


def the_way_back(W, heads):
    return W.reshape(len(W), heads, 2, -1).swapaxes(2, 3).reshape(W.shape)


def across_heads(W, heads):
    return np.concatenate([W[:, 0::2], W[:, 1::2]], axis=1)


def only_reshaped(W, heads):
    return W.reshape(len(W), heads, -1).reshape(W.shape)


def speeds(position, first=1, second=1, back=-1):
    """The right gradients but for one thing."""

    def learned_speeds_backward(speed, x, dy):
        half = len(speed)
        t = np.arange(len(x))[:, None]
        cos, sin = np.cos(t * speed), np.sin(t * speed)
        y1, y2 = np.split(halves(cos, sin, x), 2, axis=1)
        dangle = second * dy[:, half:] * y1 - first * dy[:, :half] * y2
        return halves(cos, back * sin, dy), ((t if position else 1) * dangle).sum(0)

    return learned_speeds_backward


WRONG = {
    check.slow_pairs: [
        (radians_for_turns, "not a full turn"),
        (the_fast_ones, "do come full circle"),
        (channels_for_pairs, "a pair has two"),
    ],
    check.interleaved: [
        (halves, "paired with its neighbour"),
        (left_in_halves, "are in halves"),
        (the_other_way_round, "wrong direction"),
    ],
    check.to_halves: [(the_way_back, "other way"), (across_heads, "across the heads"), (only_reshaped, "nothing has")],
    check.learned_speeds_backward: [
        (speeds(position=False), "where is the t"),
        (speeds(position=True, first=0), "y₁ depends on the angle"),
        (speeds(position=True, second=0), "y₂ depends on the angle"),
        (speeds(position=True, first=-1), "wrong sign"),
        (speeds(position=True, back=1), "transpose"),
    ],
}
