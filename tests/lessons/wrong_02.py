"""Wrong answers to the exercises of lesson 02, each with words that its hint must hold."""

import numpy as np

from minimoe.exercises import lesson_02 as check


def bias_not_summed(x, W, dy):
    return dy @ W.T, x.T @ dy, dy


def bias_summed_over_columns(x, W, dy):
    return dy @ W.T, x.T @ dy, dy.sum(1)


def bias_averaged(x, W, dy):
    return dy @ W.T, x.T @ dy, dy.mean(0)


def weight_of_the_last_token(x, W, dy):
    for t in range(len(x)):
        dW = np.outer(x[t], dy[t])
    return dy @ W.T, dW, dy.sum(0)


def weight_transposed(x, W, dy):
    return dy @ W.T, dy.T @ x, dy.sum(0)


def softmax_diagonal(p, dp):
    return p * (1 - p) * dp


def softmax_wrong_axis(p, dp):
    return p * (dp - (p * dp).sum(0))


def softmax_numerator(p, dp):
    return p * dp


def softmax_turned_around(p, dp):
    return p * ((p * dp).sum(-1, keepdims=True) - dp)


def tied_first_use(x, W, dy):
    return dy @ W @ W.T, x.T @ (dy @ W)


def tied_second_use(x, W, dy):
    return dy @ W @ W.T, dy.T @ (x @ W)


def tied_stops_half_way(x, W, dy):
    return dy @ W, x.T @ (dy @ W) + dy.T @ (x @ W)


def masked(p, targets, mask):
    return (p - np.eye(p.shape[1])[targets]) * mask[:, None] / mask.sum()


def padding_counts(p, targets, mask):
    return (p - np.eye(p.shape[1])[targets]) / mask.sum()


def mean_over_all(p, targets, mask):
    return masked(p, targets, mask) * mask.sum() / len(mask)


def without_target(p, targets, mask):
    return p * mask[:, None] / mask.sum()


def sum_instead_of_mean(p, targets, mask):
    return masked(p, targets, mask) * mask.sum()


def in_place(p, targets, mask):
    p[np.arange(len(targets)), targets] -= 1
    return p * mask[:, None] / mask.sum()


def step_without_factor(value, curvature, epsilon):
    return np.sqrt(epsilon * abs(value / curvature))


def step_of_epsilon(value, curvature, epsilon):
    return epsilon


def step_swapped(value, curvature, epsilon):
    return 2 * np.sqrt(epsilon * abs(curvature / value))


WRONG = {
    check.linear_with_bias_backward: [
        (bias_not_summed, "add them up"),
        (bias_summed_over_columns, "wrong axis"),
        (bias_averaged, "a mean over tokens"),
        (weight_of_the_last_token, "only the last token"),
        (weight_transposed, "transposed"),
    ],
    check.softmax_backward: [
        (softmax_diagonal, "diagonal only"),
        (softmax_wrong_axis, "wrong axis"),
        (softmax_numerator, "numerator only"),
        (softmax_turned_around, "wrong sign"),
    ],
    check.tied_backward: [
        (tied_first_use, "first W only"),
        (tied_second_use, "Wᵀ only"),
        (tied_stops_half_way, "stops half-way"),
    ],
    check.masked_cross_entropy_backward: [
        (padding_counts, "the padding still has a gradient"),
        (mean_over_all, "those that count"),
        (without_target, "−1"),
        (sum_instead_of_mean, "the number of tokens that count"),
        (in_place, "in place"),
    ],
    check.best_step: [
        (step_without_factor, "without its factor"),
        (step_of_epsilon, "machine epsilon itself"),
        (step_swapped, "swapped"),
    ],
}
