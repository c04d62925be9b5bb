"""Wrong answers to the exercises of lesson 10, each with words that its hint must hold."""

import numpy as np

from minimoe.exercises import lesson_10 as check


def all_one_way(start, step, L):
    return start + 2 * L * step


def once_a_block(start, step, L):
    return np.sqrt(start**2 + L * step**2)


def without_embedding(start, step, L):
    return np.sqrt(2 * L) * step


def mean_square(start, step, L):
    return start**2 + 2 * L * step**2


def root_of_the_sum(start, step, L):
    return np.sqrt(start + 2 * L * step)


def no_straight_path(norm, attention, moe, dy):
    return norm(attention(dy) + moe(dy))


def no_norm(norm, attention, moe, dy):
    return dy + attention(dy) + moe(dy)


def straight_through_the_norm(norm, attention, moe, dy):
    return norm(dy + attention(dy) + moe(dy))


def one_after_the_other(norm, attention, moe, dy):
    dh = dy + norm(moe(dy))
    return dh + norm(attention(dh))


def one_through_the_other(norm, attention, moe, dy):
    return dy + norm(attention(moe(dy)))


def only_moe(norm, attention, moe, dy):
    return dy + norm(moe(dy))


def only_attention(norm, attention, moe, dy):
    return dy + norm(attention(dy))


def table(top=True, bottom=True, last_wins=False, factor=1.0):
    """The right gradient but for one thing."""

    def tied_table_gradient(table, tokens, dx, y, dz):
        from_below = np.zeros_like(table)
        if last_wins:
            from_below[tokens] += dx
        else:
            np.add.at(from_below, tokens, dx)
        return factor * (top * (dz.T @ y) + bottom * from_below)

    return tied_table_gradient


def cap(derivative=lambda z, c: 1 - np.tanh(z / c) ** 2, squash=lambda z, c: c * np.tanh(z / c), mean=True):
    """The right gradient but for one thing."""

    def softcapped_cross_entropy_backward(z, targets, cap):
        p = np.exp(squash(z, cap))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(z)), targets] -= 1
        return p * derivative(z, cap) / (len(z) if mean else 1)

    return softcapped_cross_entropy_backward


WRONG = {
    check.stream_size: [
        (all_one_way, "squares add up"),
        (once_a_block, "twice"),
        (without_embedding, "embedding"),
        (mean_square, "its root"),
        (root_of_the_sum, "square the sizes"),
    ],
    check.parallel_block_backward: [
        (no_straight_path, "straight path is missing"),
        (no_norm, "norm's own backward"),
        (straight_through_the_norm, "around the norm"),
        (one_after_the_other, "both layers get the same dy"),
        (one_through_the_other, "side by side"),
        (only_moe, "attention is missing"),
        (only_attention, "MoE is missing"),
    ],
    check.tied_table_gradient: [
        (table(top=False), "used at the top too"),
        (table(bottom=False), "used at the bottom too"),
        (table(last_wins=True), "only the last one counts"),
        (table(factor=0.5), "not averaged"),
    ],
    check.softcapped_cross_entropy_backward: [
        (cap(derivative=lambda z, c: 1), "the tanh is left"),
        (cap(squash=lambda z, c: z), "capped logits, not of z"),
        (cap(squash=lambda z, c: z, derivative=lambda z, c: 1), "without any cap"),
        (cap(derivative=lambda z, c: 1 - (z / c) ** 2), "not 1 − u²"),
        (cap(derivative=lambda z, c: (1 - np.tanh(z / c) ** 2) / c), "cancel"),
        (cap(derivative=lambda z, c: 1 - (c * np.tanh(z / c)) ** 2), "was squared"),
        (cap(mean=False), "4 is N"),
    ],
}
