"""Checks of lesson 41: preferences."""

from __future__ import annotations

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure


def answer_mask(answer: Answer) -> Report:
    """(prompt, answer, T) → which places predict a token of the answer."""
    cases = (([3, 1, 2], [2, 4, 3], 7), ([2, 0], [3, 4], 6))  # in the second, a prompt is empty
    return first_failure(_answer_mask(answer, np.array(p), np.array(a), T) for p, a, T in cases)


def _answer_mask(answer: Answer, prompt: Array, length: Array, T: int) -> Report:
    at = np.arange(T)
    start, stop = prompt[:, None], (prompt + length)[:, None]

    def between(first: Array, last: Array) -> Array:
        return ((at >= first) & (at < last)).astype(float)

    right = between(start - 1, stop - 1)
    hints = {
        "this marks the places of the answer's tokens, but place t predicts token t + 1: begin one place earlier.": (
            between(start, stop)
        ),
        "the place of the end token predicts nothing that counts: stop one place earlier.": between(start - 1, stop),
        "the last token of the prompt predicts the first of the answer: begin one place earlier.": (
            between(start, stop - 1)
        ),
        "the end token does not count here, but it is part of the answer: stop one place later.": (
            between(start - 1, stop - 2)
        ),
        "this is one place too early: the first token of the answer is predicted at the last one of the prompt.": (
            between(start - 2, stop - 2)
        ),
        "this marks the prompt as well: only the answer counts.": between(0 * start, stop - 1),
        "padding after the answer counts here.": between(start - 1, 0 * stop + T),
        "this is the complement: 1 belongs to the answer.": 1 - right,
    }
    mistakes = {hint: wrong for hint, wrong in hints.items() if not np.array_equal(wrong, right)}
    return values(answer, (prompt, length, T), {"m": right}, sizes={"B": len(prompt), "T": T}, mistakes={"m": mistakes})


def doubt(answer: Answer) -> Report:
    """(mu, epsilon) → the smoothed loss, its slope, and the margin at which it is lowest."""
    mu = np.array([-1.7, 0.4, 3.1, 0.9, -0.2])
    return first_failure(_doubt(answer, mu, epsilon) for epsilon in (0.2, 0.05))


def _doubt(answer: Answer, mu: Array, epsilon: float) -> Report:
    right, wrong = np.logaddexp(0, -mu), np.logaddexp(0, mu)  # −log σ(μ), −log σ(−μ)
    sigma = np.exp(-right)
    best = np.log((1 - epsilon) / epsilon)
    return values(
        answer,
        (mu, epsilon),
        {"loss": (1 - epsilon) * right + epsilon * wrong, "slope": sigma - 1 + epsilon, "best": best},
        sizes={"P": len(mu)},
        mistakes={
            "loss": {
                "ε is the probability that the label is wrong, so it belongs to −log σ(−μ).": (
                    epsilon * right + (1 - epsilon) * wrong
                ),
                "this is the loss without doubt: ε is not used.": right,
                "the second term has a minus of its own: it is subtracted here.": (1 - epsilon) * right
                - epsilon * wrong,
                "this is the mean over the pairs; give the loss of each.": (
                    ((1 - epsilon) * right + epsilon * wrong).mean()
                ),
            },
            "slope": {
                "the second term is forgotten: its slope is ε σ(μ).": (1 - epsilon) * (sigma - 1),
                "the slope of −log σ(−μ) is +σ(μ), not −σ(μ).": (1 - epsilon) * (sigma - 1) - epsilon * sigma,
                "this is the slope without doubt: ε is not used.": sigma - 1,
                "the sign is wrong: a larger margin lowers the loss of a pair that is told apart wrongly.": (
                    1 - sigma - epsilon
                ),
                "ε has the wrong sign: doubt pulls the margin back.": sigma - 1 - epsilon,
            },
            "best": {
                "this is its negative: the labels are right more often than wrong.": -best,
                "this is the probability σ(μ) at the lowest point; give μ.": 1 - epsilon,
                "1 − ε is forgotten: find the μ at which the slope is 0.": -np.log(epsilon),
                "this is the odds; their logarithm is missing.": (1 - epsilon) / epsilon,
            },
        },
    )


def ipo_backward(answer: Answer) -> Report:
    """(Δ_w, Δ_l, |y_w|, |y_l|, β) → the gradient of IPO's loss with respect to both log-probabilities."""
    rng = np.random.default_rng(41)
    delta_w, delta_l = 3 * rng.standard_normal((2, 4))
    length_w, length_l, beta = np.array([3.0, 5.0, 2.0, 7.0]), np.array([4.0, 2.0, 9.0, 3.0]), 0.4
    off = delta_w / length_w - delta_l / length_l - 1 / (2 * beta)
    of_sums = delta_w - delta_l - 1 / (2 * beta)
    P = len(off)

    def loss(l_w: Array, l_l: Array) -> Array:
        return ((l_w / length_w - l_l / length_l - 1 / (2 * beta)) ** 2).mean()

    def wrong(name: str) -> dict[str, Array]:
        sign, length = (1, length_w) if name == "dl_w" else (-1, length_l)
        return {
            "the lengths are forgotten inside h: IPO compares means per token.": sign * 2 * of_sums / (length * P),
            "the lengths are not used at all: IPO compares means per token.": sign * 2 * of_sums / P,
            "h is divided by the length, so its derivative is too: divide by |y|.": sign * 2 * off / P,
            "this is the gradient of the sum over the pairs; the loss is their mean.": sign * 2 * off / length,
            "the 2 of the square is missing.": sign * off / (length * P),
            "the target 1/(2β) is missing.": sign * 2 * (off + 1 / (2 * beta)) / (length * P),
            "the target is 1/(2β), not 1/β.": sign * 2 * (off - 1 / (2 * beta)) / (length * P),
            "the target is 1/(2β), not β/2.": sign * 2 * (off + 1 / (2 * beta) - beta / 2) / (length * P),
            "the sign is wrong.": -sign * 2 * off / (length * P),
            "each answer has its own length; here both have the same.": (
                sign * 2 * off / ((length_l if name == "dl_w" else length_w) * P)
            ),
        }

    return gradients(
        answer,
        (delta_w, delta_l, length_w, length_l, beta),
        loss,
        {"l_w": delta_w, "l_l": delta_l},
        sizes={"P": P},
        mistakes={name: wrong(name) for name in ("dl_w", "dl_l")},
    )
