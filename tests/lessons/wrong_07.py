"""Wrong answers to the exercises of lesson 07, each with words that its hint must hold, and unusual right ones."""

import math

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


def indirect(sum_of):
    """The right gradient of weights that are not renormalised, but for the sum."""

    def switch_backward(p, chosen, dw):
        dp = scattered(p, chosen, dw)
        return p * (dp - sum_of(p, dp))

    return switch_backward


def diagonal(p, chosen, dw):
    return p * (1 - p) * scattered(p, chosen, dw)


def by_jacobian(p, chosen, dw):
    dp = scattered(p, chosen, dw)
    return np.stack([(np.diag(row) - np.outer(row, row)) @ d for row, d in zip(p, dp, strict=True)])


def choice_by_choice(p, chosen, dw):
    dc = np.zeros_like(p)
    for n, (experts, row) in enumerate(zip(chosen, dw, strict=True)):
        for i, d in zip(experts, row, strict=True):
            dc[n] -= d * p[n, i] * p[n]
            dc[n, i] += d * p[n, i]
    return dc


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


def over_all_experts(s, chosen, dw):
    total = s.sum(1, keepdims=True)
    s_chosen = np.take_along_axis(s, chosen, 1)
    ds = (dw - (s_chosen / total * dw).sum(1, keepdims=True)) / total
    return scattered(s, chosen, ds * s_chosen * (1 - s_chosen))


def not_renormalised(s, chosen, dw):
    return scattered(s, chosen, dw) * s * (1 - s)


def plain_mean(s, chosen, dw):
    s_chosen = np.take_along_axis(s, chosen, 1)
    ds = (dw - dw.mean(1, keepdims=True)) / s_chosen.sum(1, keepdims=True)
    return scattered(s, chosen, ds * s_chosen * (1 - s_chosen))


def with_a_mask(s, chosen, dw):
    mask = scattered(s, chosen, np.ones(chosen.shape))
    w = mask * s / (mask * s).sum(1, keepdims=True)
    dw = scattered(s, chosen, dw)
    return w * (1 - s) * (dw - (w * dw).sum(1, keepdims=True))


def sigmoid_by_jacobian(s, chosen, dw):
    dc = np.zeros_like(s)
    for n, S in enumerate(chosen):
        w = s[n, S] / s[n, S].sum()
        dc[n, S] = (dw[n] @ (np.eye(len(S)) - np.outer(w, np.ones(len(S))))) / s[n, S].sum() * s[n, S] * (1 - s[n, S])
    return dc


def counted(N, E, K, renormalize):
    """The logits that reach a weight, less those whose weight is always 1."""
    per_token = [K if renormalize else E, 0][renormalize and K == 1]
    return sum(per_token for _ in range(N))


def tried(N, E, K, renormalize):
    c, dw = np.random.default_rng(0).standard_normal((2, N, E))
    p = np.exp(c)
    chosen = np.argsort(-c, axis=1)[:, :K]
    p /= np.take_along_axis(p, chosen, 1).sum(1, keepdims=True) if renormalize else p.sum(1, keepdims=True)
    dp = scattered(p, chosen, dw[:, :K])
    reached = p if not renormalize else p * scattered(p, chosen, np.ones(chosen.shape))
    return np.count_nonzero(abs(reached * (dp - (p * dp).sum(1, keepdims=True))) > 1e-12)


def by_erf(c_0, c_1, sigma_0, sigma_1):
    lead = (c_0 - c_1) / np.hypot(sigma_0, sigma_1)
    return np.array([(1 + math.erf(x / math.sqrt(2))) / 2 for x in lead])


def as_one_minus_the_other(c_0, c_1, sigma_0, sigma_1):
    return 1 - gaussian.cumulative((c_1 - c_0) / (sigma_1**2 + sigma_0**2) ** 0.5)


WRONG = {
    check.learning_logits: [
        (all_of_them, "depend on the chosen logits only"),
        (the_chosen, "in its denominator"),
        (forgot_top_1, "is 1, whatever its logit"),
        (lambda N, E, K, renormalize: (N * K, N * E), "returns 2 values, expected 1: logits"),
        (lambda N, E, K, renormalize: K if renormalize else E, "the batch has N of them"),
        (lambda N, E, K, renormalize: N * (K - 1) if renormalize else N * E, "although their sum is zero"),
        (lambda N, E, K, renormalize: 0 if K == 1 else N * (K if renormalize else E), "only a renormalised weight"),
    ],
    check.duel: [
        (duel(lambda a, b: a), "expert 1 is noisy too"),
        (duel(lambda a, b: b), "expert 0 is noisy too"),
        (duel(lambda a, b: a + b), "do not add up: which"),
        (duel(lambda a, b: np.sqrt(abs(a**2 - b**2))), "also in a difference"),
        (duel(lambda a, b: a**2 + b**2), "divides by the variance"),
        (duel(np.hypot, -1), "the chance of expert 1"),
        (lambda c_0, c_1, a, b: (c_0 - c_1) / np.hypot(a, b), "apply Φ"),
        (lambda c_0, c_1, a, b: gaussian.density((c_0 - c_1) / np.hypot(a, b)), "the area below it"),
        (lambda c_0, c_1, a, b: 100 * gaussian.cumulative((c_0 - c_1) / np.hypot(a, b)), "per cent"),
        (lambda c_0, c_1, a, b: c_0 - c_1, "must lie between 0 and 1"),
    ],
    check.switch_backward: [
        (only_the_chosen, "not chosen are missing"),
        (as_if_renormalised, "gradient of renormalised weights"),
        (without_the_mean, "lacks the mean"),
        (diagonal, "has the diagonal only"),
        (indirect(lambda p, dp: dp.sum(1, keepdims=True)), "weighted with its p"),
        (indirect(lambda p, dp: dp.mean(1, keepdims=True)), "the mean must be weighted with p"),
        (indirect(lambda p, dp: (p * dp).sum(0)), "the sum is over tokens"),
        (indirect(lambda p, dp: (p * dp).sum()), "over the whole matrix"),
    ],
    check.sigmoid_gate_backward: [
        (sigmoid_gate(slope=False), "one step is left to c"),
        (sigmoid_gate(mean=False), "lacks the second path"),
        (sigmoid_gate(over_sum=False), "sum of the chosen s is missing"),
        (sigmoid_gate(weighted_with_s=True), "weighted with w"),
        (like_a_softmax, "backward pass of a softmax"),
        (over_all_experts, "the sum over all experts"),
        (not_renormalised, "without renormalising"),
        (plain_mean, "the chosen are not equal"),
    ],
}

RIGHT = {
    check.learning_logits: [counted, tried],
    check.duel: [by_erf, as_one_minus_the_other],
    check.switch_backward: [by_jacobian, choice_by_choice],
    check.sigmoid_gate_backward: [with_a_mask, sigmoid_by_jacobian],
}
