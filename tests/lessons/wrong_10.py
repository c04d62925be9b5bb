"""Wrong answers to the exercises of lesson 10, each with words that its hint must hold, and unusual right ones."""

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


def embedding_outside_the_root(start, step, L):
    return start + np.sqrt(2 * L) * step


def block_by_block(start, step, L):
    square = start * start
    for _ in range(2 * L):
        square += step * step
    return square**0.5


def as_a_hypotenuse(start, step, L):
    return np.hypot(start, step * np.sqrt(L + L))


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


def norm_of_each(norm, attention, moe, dy):
    return norm(attention(dy)) + norm(moe(dy)) + dy


def in_place(norm, attention, moe, dy):
    dx = dy.copy()
    dx += norm(np.add(moe(dy), attention(dy)))
    return (dx,)


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


def mean_of_repeats(table, tokens, dx, y, dz):
    dtable = dz.T @ y
    for token in set(tokens.tolist()):
        dtable[token] += dx[tokens == token].mean(0)
    return dtable


def bottom_subtracted(table, tokens, dx, y, dz):
    dtable = dz.T @ y
    np.subtract.at(dtable, tokens, dx)
    return dtable


def by_one_hot(table, tokens, dx, y, dz):
    one_hot = np.eye(len(table))[tokens]
    return one_hot.T @ dx + (y.T @ dz).T


def token_by_token(table, tokens, dx, y, dz):
    dtable = np.zeros_like(table)
    for n, token in enumerate(tokens):
        dtable[token] += dx[n]
        dtable += dz[n][:, None] * y[n]
    return dtable


def cap(derivative=lambda z, c: 1 - np.tanh(z / c) ** 2, squash=lambda z, c: c * np.tanh(z / c), mean=True):
    """The right gradient but for one thing."""

    def softcapped_cross_entropy_backward(z, targets, cap):
        p = np.exp(squash(z, cap))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(z)), targets] -= 1
        return p * derivative(z, cap) / (len(z) if mean else 1)

    return softcapped_cross_entropy_backward


def by_cosh(z, targets, cap):
    capped = cap * np.tanh(z / cap)
    p = np.exp(capped - np.logaddexp.reduce(capped, axis=1)[:, None])
    return (p - np.eye(z.shape[1])[targets]) / np.cosh(z / cap) ** 2 / z.shape[0]


def by_the_jacobian(z, targets, cap):
    dz = np.empty_like(z)
    for n, row in enumerate(z):
        squashed = cap * np.tanh(row / cap)
        p = np.exp(squashed) / np.exp(squashed).sum()
        dp = np.zeros(len(row))
        dp[targets[n]] = -1 / p[targets[n]] / len(z)
        dz[n] = (np.diag(p) - np.outer(p, p)) @ dp * (1 - (squashed / cap) ** 2)
    return dz


WRONG = {
    check.stream_size: [
        (all_one_way, "squares add up"),
        (once_a_block, "twice"),
        (without_embedding, "embedding"),
        (mean_square, "its root"),
        (root_of_the_sum, "square the sizes"),
        (embedding_outside_the_root, "one of the independent terms"),
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
        (mean_of_repeats, "this is their mean"),
        (bottom_subtracted, "not subtracted"),
    ],
    check.softcapped_cross_entropy_backward: [
        (cap(derivative=lambda z, c: 1), "the tanh is left"),
        (cap(squash=lambda z, c: z), "capped logits, not of z"),
        (cap(squash=lambda z, c: z, derivative=lambda z, c: 1), "without any cap"),
        (cap(derivative=lambda z, c: 1 - (z / c) ** 2), "not 1 − u²"),
        (cap(derivative=lambda z, c: (1 - np.tanh(z / c) ** 2) / c), "cancel"),
        (cap(derivative=lambda z, c: 1 - (c * np.tanh(z / c)) ** 2), "was squared"),
        (cap(mean=False), "4 is N"),
        (cap(derivative=lambda z, c: 1 - np.tanh(z / c)), "not 1 − tanh(u)"),
        (cap(derivative=lambda z, c: 1 - np.tanh(z) ** 2), "at z / c"),
    ],
}
RIGHT = {
    check.stream_size: [block_by_block, as_a_hypotenuse],
    check.parallel_block_backward: [norm_of_each, in_place],
    check.tied_table_gradient: [by_one_hot, token_by_token],
    check.softcapped_cross_entropy_backward: [by_cosh, by_the_jacobian],
}
