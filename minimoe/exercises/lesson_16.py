"""Checks of lesson 16: from NumPy to the GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure


def tokens_to_be_busy(answer: Answer) -> Report:
    """(operations, bandwidth, number, E, K) → tokens in a batch."""
    cases = ((6e13, 1.2e12, 8, 12, 4), (9e14, 3e12, 2, 64, 8), (3e14, 2e12, 1, 1, 1))
    return first_failure(_tokens_to_be_busy(answer, *case) for case in cases)


def _tokens_to_be_busy(answer: Answer, operations: float, bandwidth: float, number: int, E: int, K: int) -> Report:
    ridge = operations / bandwidth
    right = ridge * number / 2 * E / K
    hints = {
        "this is for one expert, but each expert gets only a share of the batch.": ridge * number / 2,
        "an expert gets K/E of the batch, so the batch must be larger, not smaller.": ridge * number / 2 * K / E,
        "a token and a weight take two operations, a product and a sum.": ridge * number * E / K,
        "a weight has several bytes, and all of them are fetched.": ridge / 2 * E / K,
        "count the bytes of a weight too, and two operations for each token that uses it.": ridge * E / K,
        "more bytes per weight need more tokens, not fewer.": ridge * 2 / number * E / K,
    }
    return values(
        answer,
        (operations, bandwidth, number, E, K),
        {"tokens": right},
        mistakes={"tokens": {hint: wrong for hint, wrong in hints.items() if wrong != right}},
    )


class _Unasked(np.ndarray):
    """An array that refuses to become a Python value; an array on a GPU could become one only after waiting."""

    def _refuse(self, *_: object) -> NoReturn:
        raise RuntimeError("here Python reads a value of an array, so it would wait: choose with np.where instead.")

    __bool__ = __float__ = __int__ = __index__ = tolist = item = _refuse


def guarded_step(answer: Answer) -> Report:
    """(w, d, rate) → the new w; the gradient is finite, then holds a NaN, then an infinity of either sign."""
    return first_failure(_guarded_step(answer, poison) for poison in (0.5, np.nan, np.inf, -np.inf))


def _guarded_step(answer: Answer, poison: float) -> Report:
    rng = np.random.default_rng(16)
    w, d, rate = rng.standard_normal((3, 4)), rng.standard_normal((3, 4)), 0.3
    d[1, 2] = poison
    finite = bool(np.isfinite(d).all())
    healthy = np.isfinite(d)
    hints = {
        "one bad number makes the whole gradient wrong: leave out the whole step, not that entry.": (
            np.where(healthy, w - rate * np.where(healthy, d, 0), w)
        ),
        "only a row is left out, but one bad number makes the whole gradient wrong.": (
            np.where(healthy.all(1, keepdims=True), w - rate * np.where(healthy, d, 0), w)
        ),
        "only a column is left out, but one bad number makes the whole gradient wrong.": (
            np.where(healthy.all(0), w - rate * np.where(healthy, d, 0), w)
        ),
        "this gradient is finite, so the step must be taken.": w,
        "a step must go against the gradient.": w + rate * np.where(healthy, d, 0),
        "the step is as long as the gradient: the rate is missing.": w - np.where(healthy, d, 0),
    }
    right = w - rate * d if finite else w
    report = values(
        answer,
        (w.view(_Unasked), d.view(_Unasked), rate),
        {"w": right},
        sizes={"D": 3, "F": 4},
        mistakes={"w": {hint: wrong for hint, wrong in hints.items() if not np.array_equal(wrong, right)}},
    )
    if "not finite" in report.sentence:
        bad = str(poison).replace("inf", "infinity")
        sentence = (
            f"w: with a {bad} in d, w is no longer finite: check for NaN and for both infinities, and choose, do not"
        )
        return replace(report, sentence=f"{sentence} multiply, because 0 times NaN or infinity is NaN.")
    return report


def gather_backward(answer: Answer) -> Report:
    """(token, dx_sorted, K) → dx."""
    rng = np.random.default_rng(16)
    N, D, K = 5, 4, 3
    token = rng.permutation(np.repeat(np.arange(N), K))
    x, dx_sorted = rng.standard_normal((N, D)), rng.standard_normal((N * K, D))

    last_wins = np.zeros((N, D))
    last_wins[token] = dx_sorted
    by_token = dx_sorted[np.argsort(token, kind="stable")].reshape(N, K, D)
    return gradients(
        answer,
        (token, dx_sorted, K),
        lambda x: (x[token] * dx_sorted).sum(),
        {"x": x},
        sizes={"N": N, "D": D, "K": K},
        mistakes={
            "dx": {
                "a token has K rows, and all of them add up; with `dx[token] = …` or `+=`, the last one wins.": (
                    last_wins
                ),
                "the rows of a token are not neighbours yet: bring them together first.": (
                    dx_sorted.reshape(N, K, D).sum(1)
                ),
                "token says which token a row belongs to, not where to find a row: you need the order that sorts it.": (
                    dx_sorted[token].reshape(N, K, D).sum(1)
                ),
                "the gradients of several uses must be added, not averaged.": by_token.mean(1),
                "each token was used K times, but this is the gradient of one use only.": by_token[:, 0],
                "after sorting, the K rows of a token are neighbours: reshape to (N, K, D), not to (K, N, D).": (
                    by_token.reshape(K, N, D).sum(0)
                ),
            }
        },
    )


def merge_tiles(answer: Answer) -> Report:
    """(o1, lse1, o2, lse2) → o, lse. In later cases the scores of one tile or of both are far from zero."""
    offsets = ((0.0, 0.0), (1000.0, 1000.0), (-1000.0, -1000.0), (0.0, 2000.0), (2000.0, 0.0))
    return first_failure(_merge_tiles(answer, *pair) for pair in offsets)


def _merge_tiles(answer: Answer, first: float, second: float) -> Report:
    rng = np.random.default_rng(16)
    T, C = 5, 3
    scores, v = rng.standard_normal((T, 7)), rng.standard_normal((7, C))
    scores += np.where(np.arange(7) < 2, first, second)

    def attend(columns: slice) -> tuple[Array, Array]:
        part = scores[:, columns]
        peak = part.max(1, keepdims=True)
        weights = np.exp(part - peak)
        total = weights.sum(1, keepdims=True)
        return weights / total @ v[columns], peak + np.log(total)

    (o1, lse1), (o2, lse2) = attend(slice(2)), attend(slice(2, None))
    o, lse = attend(slice(None))
    share = np.exp(lse1 - lse)
    with np.errstate(over="ignore", invalid="ignore"):
        unnormalised = np.exp(lse1) * o1 + np.exp(lse2) * o2
    hints_o = {
        "the tiles have different weights: the weight of a tile is e to its log-sum-exp.": (o1 + o2) / 2,
        "the weights of each tile sum to one, so those of both tiles sum to two.": o1 + o2,
        "divide by the sum of both weights.": unnormalised,
        "lse is a logarithm: it must be exponentiated before it can be a weight.": (
            (lse1 * o1 + lse2 * o2) / (lse1 + lse2)
        ),
        "the weights are exchanged: the first tile has the first weight.": (1 - share) * o1 + share * o2,
    }
    hints_lse = {
        "the logarithms do not add up: add the sums that they are the logarithms of.": lse1 + lse2,
        "this is the larger of the two, but the other one counts as well.": np.maximum(lse1, lse2),
    }
    report = values(
        answer,
        (o1, lse1, o2, lse2),
        {"o": o, "lse": lse},
        sizes={"T": T, "C": C},
        mistakes={
            "o": {hint: wrong for hint, wrong in hints_o.items() if np.isfinite(wrong).all()},
            "lse": hints_lse,
        },
    )
    if "not finite" in report.sentence:
        where = f"with scores around {first:g} in the first tile and {second:g} in the second"
        sentence = (
            f"{where}, a result is not finite: e to a large number overflows, and a sum of zeros has no logarithm. "
        )
        return replace(report, sentence=f"{sentence}Subtract the larger log-sum-exp before you exponentiate.")
    return report
