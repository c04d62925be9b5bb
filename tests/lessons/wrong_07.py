"""Wrong answers to the exercises of lesson 07, each with words that its hint must hold."""

import numpy as np

from minimoe.core import gaussian
from minimoe.exercises import lesson_07 as check


def all_of_them(N, E, K, renormalize):
    return N * E


def the_chosen(N, E, K, renormalize):
    return N * K


def forgot_top_1(N, E, K, renormalize):
    return N * K if renormalize else N * E


def duel(spread, sign=1):
    """The right chance but for the spread or the sign."""
    return lambda c_0, c_1, a, b: gaussian.cumulative(sign * (c_0 - c_1) / spread(a, b))


def scattered(p, chosen, values):
    result = np.zeros_like(p)
    np.put_along_axis(result, chosen, values, axis=1)
    return result


def only_the_chosen(p, chosen, dw):
    w = np.take_along_axis(p, chosen, 1)
    return scattered(p, chosen, w * (dw - (w * dw).sum(1, keepdims=True)))


def as_if_renormalised(p, chosen, dw):
    w = np.take_along_axis(p, chosen, 1)
    w = w / w.sum(1, keepdims=True)
    return scattered(p, chosen, w * (dw - (w * dw).sum(1, keepdims=True)))


def without_the_mean(p, chosen, dw):
    return p * scattered(p, chosen, dw)


def sigmoid_gate(slope=True, mean=True, over_sum=True, weighted_with_s=False):
    """The right gradient but for one thing."""

    def sigmoid_gate_backward(s, chosen, dw):
        s_chosen = np.take_along_axis(s, chosen, 1)
        total = s_chosen.sum(1, keepdims=True)
        w = s_chosen if weighted_with_s else s_chosen / total
        ds = dw - mean * (w * dw).sum(1, keepdims=True)
        ds = ds / total if over_sum else ds
        return scattered(s, chosen, ds * s_chosen * (1 - s_chosen) if slope else ds)

    return sigmoid_gate_backward


def like_a_softmax(s, chosen, dw):
    return as_if_renormalised(s, chosen, dw)


WRONG = {
    check.learning_logits: [
        (all_of_them, "depend on the chosen logits only"),
        (the_chosen, "in its denominator"),
        (forgot_top_1, "is 1, whatever its logit"),
    ],
    check.duel: [
        (duel(lambda a, b: a), "expert 1 is noisy too"),
        (duel(lambda a, b: b), "expert 0 is noisy too"),
        (duel(lambda a, b: a + b), "do not add up: which"),
        (duel(lambda a, b: np.sqrt(abs(a**2 - b**2))), "also in a difference"),
        (duel(lambda a, b: a**2 + b**2), "divides by the variance"),
        (duel(np.hypot, -1), "the chance of expert 1"),
    ],
    check.switch_backward: [
        (only_the_chosen, "not chosen are missing"),
        (as_if_renormalised, "gradient of renormalised weights"),
        (without_the_mean, "lacks the mean"),
    ],
    check.sigmoid_gate_backward: [
        (sigmoid_gate(slope=False), "one step is left to z"),
        (sigmoid_gate(mean=False), "lacks the second path"),
        (sigmoid_gate(over_sum=False), "sum of the chosen s is missing"),
        (sigmoid_gate(weighted_with_s=True), "weighted with w"),
        (like_a_softmax, "backward pass of a softmax"),
    ],
}
