"""Wrong answers to the exercises of lesson 06, each with words that its hint must hold."""

import math

import numpy as np

from minimoe.exercises import lesson_06 as check


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def glu(slope=lambda a, s: s * (1 - s), other=True, value=lambda a, s: s):
    """The right gradients but for one thing."""

    def glu_backward(a, b, dh):
        s = sigmoid(a)
        return dh * (b if other else 1) * slope(a, s), dh * value(a, s)

    return glu_backward


def matrices(gate, up, down):
    return lambda: (np.array(gate, float), np.array(up, float), np.array(down, float))


def one_matrix(as_gate=True, as_value=True, slope=lambda a, s: s * (1 + a * (1 - s)), factor=True, dx=True, silu=True):
    """The right gradients but for one thing; with ``dx`` False the first is left open."""

    def one_matrix_backward(x, W, dh):
        a = x @ W
        s = sigmoid(a)
        da = as_gate * dh * (a if factor else 1) * slope(a, s) + as_value * dh * (a if silu else 1) * s
        return (da @ W.T if dx else ...), x.T @ da

    return one_matrix_backward


WRONG = {
    check.llama_width: [
        (lambda D: 8 * D / 3, "not a multiple of 256"),
        (lambda D: 8 * D // 3, "not to a multiple"),
        (lambda D: 256 * (8 * D // 3 // 256), "round up, not down"),
        (lambda D: 256 * round(8 * D / 3 / 256), "nor to the nearest"),
        (lambda D: 4 * D, "a third matrix"),
        (lambda D: 256 * math.ceil(4 * D / 256), "a third matrix"),
    ],
    check.glu_backward: [
        (glu(slope=lambda a, s: s * (1 + a * (1 - s))), "slope of silu"),
        (glu(other=False), "b, is missing"),
        (glu(slope=lambda a, s: 1), "slope of the sigmoid is missing"),
        (glu(slope=lambda a, s: s), "not s."),
        (glu(value=lambda a, s: a * s), "not by silu(a)"),
        (glu(value=lambda a, s: a), "not by a."),
        (glu(value=lambda a, s: s * (1 - s)), "belongs to da"),
    ],
    check.multiplier: [
        (matrices([[1, 0], [0, 0]], [[0, 0], [1, 0]], [[1], [0]]), "one channel gives silu(x_0)"),
        (matrices([[0, 0], [1, 0]], [[1, 0], [0, 0]], [[1], [0]]), "one channel gives silu(x_1)"),
        (matrices([[1, -1], [0, 0]], [[0, 0], [1, 1]], [[1], [1]]), "subtracted, not added"),
        (matrices([[1, -1], [0, 0]], [[0, 0], [1, 1]], [1, -1]), "W_down has shape (2,)"),
        (lambda: (np.eye(2), np.eye(2)), "2 matrices, expected 3"),
        (lambda: (np.eye(2), ..., ...), "still returns `...`"),
        (matrices([[1, -1], [0, 0]], [[0, 0], [1, 1]], [[2], [-2]]), "2 times too large"),
        (matrices([[0, 0], [1, 1]], [[1, -1], [0, 0]], [[1], [-1]]), "2 · silu(x_1) · x_0"),
        (matrices([[1, 1], [0, 0]], [[0, 0], [1, -1]], [[1], [-1]]), "2 · silu(x_0) · x_1"),
    ],
    check.one_matrix_backward: [
        (one_matrix(as_value=False), "path as gate"),
        (one_matrix(as_gate=False), "path as value"),
        (one_matrix(slope=lambda a, s: s), "two terms"),
        (one_matrix(factor=False), "the factor a is missing"),
        (one_matrix(slope=lambda a, s: 1), "slope of silu is missing"),
        (one_matrix(silu=False), "not dh · s"),
        (one_matrix(as_value=False, dx=False), "dW: a reaches h by two paths"),
    ],
}


def in_whole_numbers(D):
    return -(-8 * D // 768) * 256


def by_counting_up(D):
    F = 256
    while 3 * D * F < 8 * D * D:
        F += 256
    return float(F)


def glu_by_tanh(a, b, dh):
    s = 0.5 + 0.5 * np.tanh(a / 2)
    return dh * b * (s - s**2), s * dh


def glu_by_exponentials(a, b, dh):
    e = np.exp(-a)
    return dh * b * e / (1 + e) ** 2, dh / (1 + e)


def one_matrix_at_once(x, W, dh):
    a = x @ W
    s = sigmoid(a)
    da = dh * a * s * (2 + a * (1 - s))  # the slope of a² s
    return da @ W.T, x.T @ da


def one_matrix_as_two(x, W, dh):
    a = x @ W
    s = sigmoid(a)
    gate, value = dh * a * (s + a * s * (1 - s)), dh * a * s
    return np.einsum("nf,df->nd", gate, W) + value @ W.T, x.T @ gate + np.einsum("nd,nf->df", x, value)


RIGHT = {
    check.llama_width: [in_whole_numbers, by_counting_up],
    check.glu_backward: [glu_by_tanh, glu_by_exponentials],
    check.multiplier: [
        matrices([[0, 0], [-1, 1]], [[1, 1], [0, 0]], [[-1], [1]]),
        matrices([[-1, 1], [0, 0]], [[0, 0], [4, -2]], [[-0.25], [-0.5]]),
        lambda: ([[1, -1], [0, 0]], [[0, 0], [1, 1]], [[1], [-1]]),
    ],
    check.one_matrix_backward: [one_matrix_at_once, one_matrix_as_two],
}
