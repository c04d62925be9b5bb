"""Checks of lesson 07: noisy top-k gating."""

from __future__ import annotations

import numpy as np

from minimoe.core import gaussian
from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure

N, E, K = 6, 5, 3


def learning_logits(answer: Answer) -> Report:
    """(N, E, K, renormalize) → how many logits the language-model loss reaches."""
    cases = ((6, 8, 2, True), (6, 8, 2, False), (6, 8, 1, True), (6, 8, 1, False), (7, 5, 4, True))
    return first_failure(_learning_logits(answer, *case) for case in cases)


def _learning_logits(answer: Answer, tokens: int, experts: int, chosen: int, renormalize: bool) -> Report:
    right = 0 if renormalize and chosen == 1 else tokens * chosen if renormalize else tokens * experts
    hints = {
        "with renormalising, the weights depend on the chosen logits only.": tokens * experts,
        "without renormalising, a weight has every logit in its denominator.": tokens * chosen,
        "this is for one token, but the batch has N of them.": right // tokens,
        "a gradient reaches all K chosen logits, although their sum is zero.": tokens * (chosen - 1),
    }
    if chosen == 1:
        hints = (
            {"a single renormalised weight is 1, whatever its logit.": tokens}
            if renormalize
            else {
                "only a renormalised weight is always 1; this one changes with every logit.": 0,
                "without renormalising, a weight has every logit in its denominator.": tokens,
                "this is for one token, but the batch has N of them.": experts,
            }
        )
    case = f"N = {tokens}, E = {experts}, K = {chosen}, renormalize = {renormalize}"
    mistakes = {f"{case}: {hint}": wrong for hint, wrong in hints.items() if wrong != right}
    return values(answer, (tokens, experts, chosen, renormalize), {"logits": right}, mistakes={"logits": mistakes})


def duel(answer: Answer) -> Report:
    """(c_0, c_1, sigma_0, sigma_1) → the chance that c_0 + ξ_0 σ_0 is larger than c_1 + ξ_1 σ_1."""
    rng = np.random.default_rng(7)
    c_0, c_1 = rng.standard_normal((2, N))
    sigma_0, sigma_1 = rng.uniform(0.3, 2, (2, N))
    lead = c_0 - c_1
    spread = np.sqrt(sigma_0**2 + sigma_1**2)
    return values(
        answer,
        (c_0, c_1, sigma_0, sigma_1),
        {"chance": gaussian.cumulative(lead / spread)},
        sizes={"N": N},
        shares=("chance",),
        mistakes={
            "chance": {
                "this is not a chance yet: apply Φ to it.": lead / spread,
                "this draws the noise of expert 0 only, but expert 1 is noisy too.": gaussian.cumulative(
                    lead / sigma_0
                ),
                "this draws the noise of expert 1 only, but expert 0 is noisy too.": gaussian.cumulative(
                    lead / sigma_1
                ),
                "the σ of independent noises do not add up: which quantity does?": gaussian.cumulative(
                    lead / (sigma_0 + sigma_1)
                ),
                "the variances of independent noises add up, also in a difference; here they are subtracted.": (
                    gaussian.cumulative(lead / np.sqrt(abs(sigma_0**2 - sigma_1**2)))
                ),
                "this divides by the variance of the difference, but Φ needs the standard deviation.": (
                    gaussian.cumulative(lead / spread**2)
                ),
                "this is the chance of expert 1.": gaussian.cumulative(-lead / spread),
                "this is the density, φ; the chance is the area below it, Φ.": gaussian.density(lead / spread),
            }
        },
    )


def switch_backward(answer: Answer) -> Report:
    """(p, chosen, dw) → dc, for weights that are the probabilities of the chosen experts."""
    rng = np.random.default_rng(7)
    c, dw = rng.standard_normal((N, E)), rng.standard_normal((N, K))
    chosen = np.argsort(-c, axis=1)[:, :K]  # held fixed: no finite difference can flip it

    def loss(c: Array) -> Array:
        return (np.take_along_axis(_softmax(c), chosen, 1) * dw).sum()

    p = _softmax(c)
    direct = np.zeros((N, E))
    np.put_along_axis(direct, chosen, dw, axis=1)
    right = p * (direct - (p * direct).sum(1, keepdims=True))
    w = np.take_along_axis(p, chosen, 1)
    over_chosen = w / w.sum(1, keepdims=True)
    renormalised = np.zeros((N, E))
    np.put_along_axis(renormalised, chosen, over_chosen * (dw - (over_chosen * dw).sum(1, keepdims=True)), axis=1)
    return gradients(
        answer,
        (p, chosen, dw),
        loss,
        {"c": c},
        sizes={"N": N, "E": E, "K": K},
        mistakes={
            "dc": {
                "the logits that were not chosen are missing: they are in the denominator of every weight.": (
                    np.where(direct != 0, right, 0)
                ),
                "this is the gradient of renormalised weights, but here a row of weights does not sum to 1.": (
                    renormalised
                ),
                "dc lacks the mean term: raising one logit lowers all other probabilities.": p * direct,
                "this subtracts the plain mean of dw, but the mean must be weighted with p.": (
                    p * (direct - direct.mean(1, keepdims=True))
                ),
                "this subtracts the plain sum of dw, but each dw must be weighted with its p.": (
                    p * (direct - direct.sum(1, keepdims=True))
                ),
                "this has the diagonal only: p_i changes with z_i, but also with every other logit of the row.": (
                    p * (1 - p) * direct
                ),
                "the sum is over tokens, but each token has its own softmax.": p * (direct - (p * direct).sum(0)),
                "the sum is over the whole matrix, but each token has its own softmax.": (
                    p * (direct - (p * direct).sum())
                ),
                "one factor p is missing.": direct - (p * direct).sum(1, keepdims=True),
            }
        },
    )


def sigmoid_gate_backward(answer: Answer) -> Report:
    """(s, chosen, dw) → dc, for weights s_S / Σ s_S."""
    rng = np.random.default_rng(7)
    c, dw = rng.standard_normal((N, E)), rng.standard_normal((N, K))
    chosen = np.argsort(-c, axis=1)[:, :K]  # held fixed: no finite difference can flip it

    def weights(c: Array) -> Array:
        s = np.take_along_axis(1 / (1 + np.exp(-c)), chosen, 1)
        return s / s.sum(1, keepdims=True)

    def spread(values: Array) -> Array:
        result = np.zeros((N, E))
        np.put_along_axis(result, chosen, values, axis=1)
        return result

    s = 1 / (1 + np.exp(-c))
    slope = s * (1 - s)
    total = np.take_along_axis(s, chosen, 1).sum(1, keepdims=True)
    w = weights(c)
    mean = (w * dw).sum(1, keepdims=True)
    everyone = total / s.sum(1, keepdims=True)  # what the chosen weights sum to, if all s are in the denominator
    ds = spread((dw - mean) / total)
    return gradients(
        answer,
        (s, chosen, dw),
        lambda c: (weights(c) * dw).sum(),
        {"c": c},
        sizes={"N": N, "E": E, "K": K},
        mistakes={
            "dc": {
                "this is the gradient with respect to s; one step is left to c.": ds,
                "dc lacks the second path: s_i is also in the sum that all weights are divided by.": (
                    spread(dw / total) * slope
                ),
                "1 over the sum of the chosen s is missing.": spread(dw - mean) * slope,
                "the mean must be weighted with w, whose rows sum to 1.": (spread((dw - total * mean) / total) * slope),
                "the mean must be weighted with w: the chosen are not equal.": (
                    spread((dw - dw.mean(1, keepdims=True)) / total) * slope
                ),
                "this divides by the sum over all experts, but only the chosen are in the sum.": (
                    spread((dw - everyone * mean) / s.sum(1, keepdims=True)) * slope
                ),
                "this is the gradient of s without renormalising: w_i also changes with every other chosen s.": (
                    spread(dw) * slope
                ),
                "this is the backward pass of a softmax, but here w is not an exponential over a sum of "
                "exponentials.": spread(w * (dw - mean)),
            }
        },
    )


def _softmax(c: Array) -> Array:
    p = np.exp(c - c.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)
