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
    }
    if renormalize and chosen == 1:
        hints = {"a single renormalised weight is 1, whatever its logit.": tokens}
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
        mistakes={
            "chance": {
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
            }
        },
    )


def switch_backward(answer: Answer) -> Report:
    """(p, chosen, dw) → dz, for weights that are the probabilities of the chosen experts."""
    rng = np.random.default_rng(7)
    z, dw = rng.standard_normal((N, E)), rng.standard_normal((N, K))
    chosen = np.argsort(-z, axis=1)[:, :K]  # held fixed: no finite difference can flip it

    def loss(z: Array) -> Array:
        return (np.take_along_axis(_softmax(z), chosen, 1) * dw).sum()

    p = _softmax(z)
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
        {"z": z},
        sizes={"N": N, "E": E, "K": K},
        mistakes={
            "dz": {
                "the logits that were not chosen are missing: they are in the denominator of every weight.": (
                    np.where(direct != 0, right, 0)
                ),
                "this is the gradient of renormalised weights, but here a row of weights does not sum to 1.": (
                    renormalised
                ),
                "dz lacks the mean term: raising one logit lowers all other probabilities.": p * direct,
                "this subtracts the plain mean of dw, but the mean must be weighted with p.": (
                    p * (direct - direct.mean(1, keepdims=True))
                ),
                "one factor p is missing.": direct - (p * direct).sum(1, keepdims=True),
            }
        },
    )


def sigmoid_gate_backward(answer: Answer) -> Report:
    """(s, chosen, dw) → dz, for weights s_S / Σ s_S."""
    rng = np.random.default_rng(7)
    z, dw = rng.standard_normal((N, E)), rng.standard_normal((N, K))
    chosen = np.argsort(-z, axis=1)[:, :K]  # held fixed: no finite difference can flip it

    def weights(z: Array) -> Array:
        s = np.take_along_axis(1 / (1 + np.exp(-z)), chosen, 1)
        return s / s.sum(1, keepdims=True)

    def spread(values: Array) -> Array:
        result = np.zeros((N, E))
        np.put_along_axis(result, chosen, values, axis=1)
        return result

    s = 1 / (1 + np.exp(-z))
    slope = s * (1 - s)
    total = np.take_along_axis(s, chosen, 1).sum(1, keepdims=True)
    w = weights(z)
    mean = (w * dw).sum(1, keepdims=True)
    ds = spread((dw - mean) / total)
    return gradients(
        answer,
        (s, chosen, dw),
        lambda z: (weights(z) * dw).sum(),
        {"z": z},
        sizes={"N": N, "E": E, "K": K},
        mistakes={
            "dz": {
                "this is the gradient with respect to s; one step is left to z.": ds,
                "dz lacks the second path: s_i is also in the sum that all weights are divided by.": (
                    spread(dw / total) * slope
                ),
                "1 over the sum of the chosen s is missing.": spread(dw - mean) * slope,
                "the mean must be weighted with w, whose rows sum to 1.": (spread((dw - total * mean) / total) * slope),
                "this is the backward pass of a softmax, but here w is not an exponential over a sum of "
                "exponentials.": spread(w * (dw - mean)),
            }
        },
    )


def _softmax(z: Array) -> Array:
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)
