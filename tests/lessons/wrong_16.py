"""Wrong answers to the exercises of lesson 16, each with words that its hint must hold, and unusual right ones."""

import numpy as np

from minimoe.exercises import lesson_16 as check


def busy(per_expert=lambda ridge, number: ridge * number / 2, share=lambda E, K: E / K):
    """The right number but for one thing."""

    def tokens_to_be_busy(operations, bandwidth, number, E, K):
        return per_expert(operations / bandwidth, number) * share(E, K)

    return tokens_to_be_busy


def with_if(w, d, rate):
    return w - rate * d if np.isfinite(d).all() else w


def multiplied(w, d, rate):
    return w - rate * d * np.isfinite(d).all()


def entry_by_entry(w, d, rate):
    return np.where(np.isfinite(d), w - rate * d, w)


def row_by_row(w, d, rate):
    return np.where(np.isfinite(d).all(1, keepdims=True), w - rate * d, w)


def column_by_column(w, d, rate):
    return np.where(np.isfinite(d).all(0), w - rate * d, w)


def always(w, d, rate):
    return w - rate * d


def never(w, d, rate):
    return w + 0 * rate


def uphill(w, d, rate):
    return np.where(np.isfinite(d).all(), w + rate * d, w)


def without_rate(w, d, rate):
    return np.where(np.isfinite(d).all(), w - d, w)


def last_wins(token, dx_sorted, K):
    dx = np.zeros((len(token) // K, dx_sorted.shape[1]))
    dx[token] += dx_sorted
    return dx


def not_sorted(token, dx_sorted, K):
    return dx_sorted.reshape(len(token) // K, K, -1).sum(1)


def token_as_order(token, dx_sorted, K):
    return dx_sorted[token].reshape(len(token) // K, K, -1).sum(1)


def averaged(token, dx_sorted, K):
    return dx_sorted[np.argsort(token, kind="stable")].reshape(len(token) // K, K, -1).mean(1)


def one_use(token, dx_sorted, K):
    return dx_sorted[np.argsort(token, kind="stable")][::K]


def wrong_blocks(token, dx_sorted, K):
    return dx_sorted[np.argsort(token, kind="stable")].reshape(K, len(token) // K, -1).sum(0)


def merge(weights=lambda a, b: (np.exp(a - np.logaddexp(a, b)), np.exp(b - np.logaddexp(a, b))), lse=np.logaddexp):
    """The right tiles but for one thing."""

    def merge_tiles(o1, lse1, o2, lse2):
        w1, w2 = weights(lse1, lse2)
        return w1 * o1 + w2 * o2, lse(lse1, lse2)

    return merge_tiles


def overflowing(o1, lse1, o2, lse2):
    with np.errstate(over="ignore", invalid="ignore"):
        w1, w2 = np.exp(lse1), np.exp(lse2)
        return (w1 * o1 + w2 * o2) / (w1 + w2), np.log(w1 + w2)


def against_the_first(o1, lse1, o2, lse2):
    with np.errstate(over="ignore", invalid="ignore"):
        other = np.exp(lse2 - lse1)
        return (o1 + other * o2) / (1 + other), lse1 + np.log1p(other)


def exchanged(o1, lse1, o2, lse2):
    lse = np.logaddexp(lse1, lse2)
    return np.exp(lse2 - lse) * o1 + np.exp(lse1 - lse) * o2, lse


def against_the_larger(o1, lse1, o2, lse2):
    peak = np.maximum(lse1, lse2)
    w1, w2 = np.exp(lse1 - peak), np.exp(lse2 - peak)
    return (w1 * o1 + w2 * o2) / (w1 + w2), peak + np.log(w1 + w2)


def as_a_row_of_two(o1, lse1, o2, lse2):
    both = np.concatenate([lse1, lse2], axis=1)  # (T, 2)
    weights = np.exp(both - both.max(1, keepdims=True))
    share = weights / weights.sum(1, keepdims=True)
    o = np.einsum("tn,ntc->tc", share, np.stack([o1, o2]))
    return o, both.max(1, keepdims=True) + np.log(weights.sum(1, keepdims=True))


def below_infinity(w, d, rate):
    return np.where((d < np.inf).all(), w - rate * d, w)


def by_the_largest(w, d, rate):
    return np.where(np.abs(d).max() < np.inf, w - rate * d, w)


def step_of_zero(w, d, rate):
    healthy = np.isfinite(d).all()
    return w - np.where(healthy, rate, 0) * np.where(healthy, d, 0)


def one_by_one(token, dx_sorted, K):
    dx = np.zeros((token.max() + 1, dx_sorted.shape[-1]))
    for row, t in zip(dx_sorted, token, strict=True):
        dx[t] += row
    return dx


def by_one_hot(token, dx_sorted, K):
    return np.eye(len(token) // K)[token].T @ dx_sorted


def token_by_token(operations, bandwidth, number, E, K):
    bytes_of_an_expert, tokens = number, 1
    seconds = bytes_of_an_expert / bandwidth
    return tokens * seconds / (2 / operations) * (E / K)


def as_a_fraction(operations, bandwidth, number, E, K):
    return np.float64(operations * number * E) / (2 * K * bandwidth)


RIGHT = {
    check.tokens_to_be_busy: [token_by_token, as_a_fraction],
    check.guarded_step: [by_the_largest, step_of_zero],
    check.gather_backward: [one_by_one, by_one_hot],
    check.merge_tiles: [against_the_larger, as_a_row_of_two],
}
WRONG = {
    check.tokens_to_be_busy: [
        (busy(share=lambda E, K: 1), "for one expert"),
        (busy(share=lambda E, K: K / E), "larger, not smaller"),
        (busy(per_expert=lambda ridge, number: ridge * number), "two operations"),
        (busy(per_expert=lambda ridge, number: ridge / 2), "several bytes"),
        (busy(per_expert=lambda ridge, number: ridge), "count the bytes"),
        (busy(per_expert=lambda ridge, number: ridge * 2 / number), "more tokens, not fewer"),
    ],
    check.guarded_step: [
        (with_if, "would wait"),
        (multiplied, "do not multiply"),
        (always, "do not multiply"),
        (below_infinity, "both infinities"),
        (entry_by_entry, "not that entry"),
        (row_by_row, "a row is left out"),
        (column_by_column, "a column is left out"),
        (never, "must be taken"),
        (uphill, "against the gradient"),
        (without_rate, "the rate is missing"),
    ],
    check.gather_backward: [
        (last_wins, "the last one wins"),
        (not_sorted, "not neighbours yet"),
        (token_as_order, "the order that sorts"),
        (averaged, "not averaged"),
        (one_use, "one use only"),
        (wrong_blocks, "not to (K, N, D)"),
    ],
    check.merge_tiles: [
        (merge(weights=lambda a, b: (0.5, 0.5)), "different weights"),
        (merge(weights=lambda a, b: (1, 1)), "sum to two"),
        (merge(weights=lambda a, b: (np.exp(a), np.exp(b))), "divide by the sum"),
        (merge(weights=lambda a, b: (a / (a + b), b / (a + b))), "exponentiated"),
        (merge(lse=np.add), "do not add up"),
        (merge(lse=np.maximum), "larger of the two"),
        (overflowing, "before you exponentiate"),
        (against_the_first, "before you exponentiate"),
        (exchanged, "the first tile has the first weight"),
    ],
}
