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


def counted(exponent=lambda j, C: -2 * j / C, angle=2 * np.pi):
    """The right count but for one thing."""

    def slow_pairs(head_width, theta, context):
        speed = theta ** exponent(np.arange(head_width // 2), head_width)
        return int((context * speed < angle).sum())

    return slow_pairs


def by_the_logarithm(head_width, theta, context):
    half = head_width // 2
    return half - 1 - int(np.floor(np.log(context / 2 / np.pi) / np.log(theta) * half))


def last_pair_at_theta(head_width, theta, context):
    j = np.arange(head_width // 2)
    return int((context * theta ** (-j / j[-1]) < 2 * np.pi).sum())


def paired(cos, sin, x, minus=-1):
    even, odd = x[:, 0::2], x[:, 1::2]
    return np.stack([even * cos + minus * odd * sin, odd * cos + even * sin], axis=2).reshape(x.shape)


def plus_twice(cos, sin, x):
    return paired(cos, sin, x, minus=1)


def tiled(cos, sin, x):
    turned = np.stack([-x[:, 1::2], x[:, 0::2]], axis=2).reshape(x.shape)
    return x * np.tile(cos, 2) + turned * np.tile(sin, 2)


def overwritten(cos, sin, x):
    x[:, 0::2] = x[:, 0::2] * cos - x[:, 1::2] * sin
    x[:, 1::2] = x[:, 1::2] * cos + x[:, 0::2] * sin
    return x


def overwritten_in_a_copy(cos, sin, x):
    return overwritten(cos, sin, x.copy())


def second_members_first(W, heads):
    return W.reshape(len(W), heads, -1, 2)[..., ::-1].swapaxes(2, 3).reshape(W.shape)


def heads_mixed(W, heads):
    return W.reshape(len(W), heads, -1, 2).transpose(0, 3, 1, 2).reshape(W.shape)


def always_three_heads(W, heads):
    return W.reshape(len(W), 3, -1, 2).swapaxes(2, 3).reshape(W.shape)


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


def speeds(position, first=1, second=1, back=-1, start=0, rotated=True):
    """The right gradients but for one thing."""

    def learned_speeds_backward(speed, x, dy):
        half = len(speed)
        t = np.arange(len(x))[:, None]
        cos, sin = np.cos(t * speed), np.sin(t * speed)
        y1, y2 = np.split(halves(cos, sin, x) if rotated else x, 2, axis=1)
        dangle = second * dy[:, half:] * y1 - first * dy[:, :half] * y2
        return halves(cos, back * sin, dy), (((t + start) if position else 1) * dangle).sum(0)

    return learned_speeds_backward


WRONG = {
    check.slow_pairs: [
        (radians_for_turns, "not a full turn"),
        (the_fast_ones, "that complete a full turn"),
        (channels_for_pairs, "a pair has two"),
        (counted(angle=np.pi), "half a turn"),
        (counted(lambda j, C: -2 * (j + 1) / C), "numbered from 0"),
        (counted(lambda j, C: -j / C), "not −j/C"),
        (last_pair_at_theta, "does not quite reach 1/θ"),
        (by_the_logarithm, "head_width = 8, theta"),
    ],
    check.interleaved: [
        (halves, "paired with its neighbour"),
        (left_in_halves, "are in halves"),
        (the_other_way_round, "wrong direction"),
        (tiled, "both of them need"),
        (plus_twice, "which one"),
        (lambda cos, sin, x: paired(sin, cos, x), "are swapped"),
        (overwritten, "changes one of its arguments"),
        (overwritten_in_a_copy, "as it was"),
    ],
    check.to_halves: [
        (the_way_back, "other way"),
        (across_heads, "across the heads"),
        (only_reshaped, "nothing has"),
        (second_members_first, "before the second members"),
        (heads_mixed, "across the heads"),
        (always_three_heads, "wrong places"),
    ],
    check.learned_speeds_backward: [
        (speeds(position=False), "where is the t"),
        (speeds(position=True, first=0), "y₁ depends on the angle"),
        (speeds(position=True, second=0), "y₂ depends on the angle"),
        (speeds(position=True, first=-1), "wrong sign"),
        (speeds(position=True, back=1), "transpose"),
        (speeds(position=True, first=-1, second=-1), "the wrong way round"),
        (speeds(position=True, rotated=False), "uses x where y belongs"),
        (speeds(position=True, start=1), "first token is at position 0"),
    ],
}


def by_periods(head_width, theta, context):
    return sum(2 * np.pi * theta ** (channel / head_width) > context for channel in range(0, head_width, 2))


def by_a_clamped_logarithm(head_width, theta, context):
    half = head_width // 2
    fast = np.floor(np.log(context / 2 / np.pi) / np.log(theta) * half) + 1
    return half - np.clip(fast, 0, half)


def complex_numbers(cos, sin, x):
    turned = (x[:, 0::2] + 1j * x[:, 1::2]) * (cos + 1j * sin)
    return np.stack([turned.real, turned.imag], axis=2).reshape(x.shape)


def repeated(cos, sin, x):
    partner = x.reshape(len(x), -1, 2)[..., ::-1] * [-1, 1]
    return x * np.repeat(cos, 2, axis=1) + partner.reshape(x.shape) * np.repeat(sin, 2, axis=1)


def head_by_head(W, heads):
    return np.hstack([np.hstack([part[:, 0::2], part[:, 1::2]]) for part in np.split(W, heads, axis=1)])


def one_permutation(W, heads):
    width = W.shape[1] // heads
    order = np.argsort(np.arange(width) % 2, kind="stable")
    return W[:, (np.arange(heads)[:, None] * width + order).ravel()]


def complex_speeds(speed, x, dy):
    half, t = len(speed), np.arange(len(x))[:, None]
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * t * speed)
    upstream = dy[:, :half] + 1j * dy[:, half:]
    dx = upstream * np.exp(-1j * t * speed)
    return np.hstack([dx.real, dx.imag]), (t * (np.conj(turned) * upstream).imag).sum(0)


def by_slopes_of_cosine_and_sine(speed, x, dy):
    half, t = len(speed), np.arange(len(x))[:, None]
    cos, sin = np.cos(t * speed), np.sin(t * speed)
    x1, x2, dy1, dy2 = x[:, :half], x[:, half:], dy[:, :half], dy[:, half:]
    dcos, dsin = dy1 * x1 + dy2 * x2, dy2 * x1 - dy1 * x2
    return halves(cos, -sin, dy), t[:, 0] @ (dsin * cos - dcos * sin)


RIGHT = {
    check.slow_pairs: [by_periods, by_a_clamped_logarithm],
    check.interleaved: [complex_numbers, repeated],
    check.to_halves: [head_by_head, one_permutation],
    check.learned_speeds_backward: [complex_speeds, by_slopes_of_cosine_and_sine],
}
