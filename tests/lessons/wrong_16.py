"""Wrong answers to the exercises of lesson 16, each with words that its hint must hold."""

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
        (overflowing, "not finite"),
    ],
}
