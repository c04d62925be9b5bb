"""Checks of lesson 21: other gates."""

from __future__ import annotations

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure


def cosine_backward(answer: Answer) -> Report:
    """(u, m, s, dz) → du, dm, ds of the scores z = s û m̂ᵀ."""
    rng = np.random.default_rng(21)
    N, E, W = 4, 3, 5
    u, m, s = rng.standard_normal((N, W)), 2 * rng.standard_normal((E, W)), np.array(2.5)
    dz = rng.standard_normal((N, E))

    def loss(u: Array, m: Array, s: Array) -> Array:
        return (dz * (s * _unit(u) @ _unit(m).T)).sum()

    unit_u, unit_m = _unit(u), _unit(m)
    du, dm = s * dz @ unit_m, s * dz.T @ unit_u  # with respect to the unit vectors
    length_u, length_m = _length(u), _length(m)
    across = "the part of the gradient along {} must go: a longer {} has the same direction."
    return gradients(
        answer,
        (u, m, float(s), dz),
        loss,
        {"u": u, "m": m, "s": s},
        sizes={"N": N, "E": E, "W": W},
        mistakes={
            "du": {
                across.format("u", "u"): du / length_u,
                "this is the gradient with respect to û; the normalisation is left.": du,
                "the gradient must be divided by the length of u.": _across(unit_u, du),
                "the part along u is measured with û, which has length 1, not with u.": (
                    (du - u * (u * du).sum(1, keepdims=True)) / length_u
                ),
                "the factor s is missing.": _across(unit_u, du) / length_u / s,
                "u meets the normalised m̂, not m.": _across(unit_u, s * dz @ m) / length_u,
                "the part along û is subtracted, not added.": (2 * du - _across(unit_u, du)) / length_u,
                "this is the part along û, which must go; the rest must stay.": (du - _across(unit_u, du)) / length_u,
                "all of it is divided by the length of u, the part along û too.": (
                    du / length_u - (du - _across(unit_u, du))
                ),
                "each token has its own part along û; here they are added up over tokens.": (
                    (du - unit_u * (unit_u * du).sum()) / length_u
                ),
            },
            "dm": {
                across.format("m", "m"): dm / length_m,
                "this is the gradient with respect to m̂; the normalisation is left.": dm,
                "the gradient must be divided by the length of m.": _across(unit_m, dm),
                "the factor s is missing.": _across(unit_m, dm) / length_m / s,
                "m meets the normalised û, not u.": _across(unit_m, s * dz.T @ u) / length_m,
            },
            "ds": {
                "this is the gradient with respect to log s: z has s in it; divide by s.": (
                    (dz * (s * unit_u @ unit_m.T)).sum()
                ),
                "the cosines are those of the normalised vectors.": (dz * (u @ m.T)).sum(),
                "z changes with s by its cosine, so each dz counts with its cosine.": dz.sum(),
            },
        },
    )


def penalties(answer: Answer) -> Report:
    """(penalty, counts, N, K) → λ of ReMoE after each of several steps."""
    too_many, too_few = [[12, 13, 16, 11], [11, 16, 12, 16]], [[2, 5, 3, 4], [6, 1, 8, 0]]  # N K = 48 for each layer
    first_many, on_target = [[9, 11, 15, 15], [8, 10, 11, 15]], [[8, 11, 12, 14], [10, 12, 14, 15]]
    first_few, few = [[8, 8, 12, 16], [11, 14, 16, 15]], [[7, 2, 5, 6], [4, 3, 9, 4]]
    return first_failure(
        _penalties(answer, np.array(counts), 16, 3)
        for counts in (
            [too_many, too_few, first_many, on_target, on_target[::-1], first_few, few, too_many],
            [too_few, on_target[::-1], on_target, first_few, first_many, few, too_few],
        )
    )


def _penalties(answer: Answer, counts: Array, N: int, K: int) -> Report:
    penalty = 0.003
    S, L, E = counts.shape
    more = counts.sum((1, 2)) - L * N * K  # (S,)  awake beyond the target

    def after(direction: Array, start: float = penalty) -> Array:
        return start * 1.2 ** np.cumsum(np.sign(direction))

    right = after(more)
    return values(
        answer,
        (penalty, counts, N, K),
        {"penalties": right},
        sizes={"S": S, "L": L, "E": E},
        mistakes={
            "penalties": {
                "this goes the wrong way: where too many experts are awake, being awake must cost more.": after(-more),
                "this looks at the first layer only; the zeros of all layers count together.": (
                    after(counts[:, 0].sum(1) - N * K)
                ),
                "this looks at the last layer only; the zeros of all layers count together.": (
                    after(counts[:, -1].sum(1) - N * K)
                ),
                "each layer moves λ here; the zeros of all layers count together, once for each step.": (
                    after(np.sign(counts.sum(2) - N * K).sum(1))
                ),
                "this compares the entries of all layers with the target of one layer.": (
                    after(counts.sum((1, 2)) - N * K)
                ),
                "exactly on target, λ stays; here it falls.": after(np.where(more > 0, 1, -1)),
                "exactly on target, λ stays; here it grows.": after(np.where(more >= 0, 1, -1)),
                "λ is multiplied by 1.2 or divided by it; here 0.2 is added or subtracted.": (
                    penalty + 0.2 * np.cumsum(np.sign(more))
                ),
                "dividing by 1.2 is not multiplying by 0.8.": (
                    penalty * np.cumprod(np.array([0.8, 1, 1.2])[np.sign(more).astype(int) + 1])
                ),
                "every step begins with the λ that the step before left; here each begins with the first.": (
                    penalty * 1.2 ** np.sign(more)
                ),
                "this is λ before each step.": np.concatenate([[penalty], right[:-1]]),
                "1 − K/E is the share of zeros; K/E is the share of scores that are not zero.": (
                    after(np.sign(K / E - (1 - counts.mean((1, 2)) / N)))
                ),
                "λ moves by its own 20 %, not by 20 % of its first value.": (
                    penalty * (1 + 0.2 * np.cumsum(np.sign(more)))
                ),
                "each step looks at its own counts; here those of all steps so far are added up.": (
                    after(np.cumsum(more))
                ),
                "only the direction counts: one factor of 1.2 for each step, however far from the target.": (
                    penalty * 1.2 ** np.cumsum(more)
                ),
            }
        },
    )


def remoe_backward(answer: Answer) -> Report:
    """(z, dw, penalty, K) → dz of w = relu(z), with the router's own loss."""
    rng = np.random.default_rng(21)
    N, E, K, penalty = 6, 5, 2, 0.8
    z = rng.standard_normal((N, E)) + [0.9, 0, -0.4, 0.3, 0]  # experts of different popularity
    z += 0.2 * np.sign(z)  # away from the kink
    dw = rng.standard_normal((N, E))
    f = E * (z > 0).sum(0) / (K * N)

    def loss(z: Array) -> Array:
        w = np.maximum(z, 0)
        return (dw * w).sum() + penalty * (f * w.mean(0)).sum()

    awake = z > 0
    return gradients(
        answer,
        (z, dw, penalty, K),
        loss,
        {"z": z},
        sizes={"N": N, "E": E, "K": K},
        mistakes={
            "dz": {
                "an expert that is asleep learns nothing from this token: its gradient is 0.": dw + penalty * f / N,
                "the price belongs to experts that are awake, as dw does.": awake * dw + penalty * f / N,
                "the router's own loss is missing.": awake * dw,
                "this is the router's own loss alone; dw is missing.": awake * penalty * f / N,
                "1/N from the mean over tokens is missing.": awake * (dw + penalty * f),
                "every expert has the same price here; f makes a busy one more expensive.": awake * (dw + penalty / N),
                "f = E n / (K N): the factor E/K is missing.": awake * (dw + penalty * f * K / E / N),
                "f = E n / (K N): the division by K is missing.": awake * (dw + penalty * f * K / N),
                "n counts the tokens that wake the expert; this is the sum of their weights.": (
                    awake * (dw + penalty * E * np.maximum(z, 0).sum(0) / (K * N) / N)
                ),
                "the loss is added, so its gradient is too.": awake * (dw - penalty * f / N),
                "the penalty λ is missing: it multiplies the price.": awake * (dw + f / N),
                "the mean is over the N tokens only, not over experts.": awake * (dw + penalty * f / N / E),
                "n counts tokens for each expert; here it counts experts for each token.": (
                    awake * (dw + penalty * E * awake.sum(1, keepdims=True) / (K * N) / N)
                ),
                "the slope of relu is 0 or 1; here w stands in its place.": np.maximum(z, 0) * (dw + penalty * f / N),
                "dw is for experts that are awake, as the price is.": dw + awake * penalty * f / N,
                "the price is added to dw and does not multiply it.": awake * dw * (1 + penalty * f / N),
            }
        },
    )


def experts_of_top_p(answer: Answer) -> Report:
    """(p, P) → how many experts each token uses: the fewest whose probabilities add up to P or more."""
    first = np.array([[0.125, 0.5, 0.25, 0.125], [0.0625, 0.0625, 0.125, 0.75], [0.25, 0.3125, 0.1875, 0.25]])
    return first_failure(_experts_of_top_p(answer, first, threshold) for threshold in (0.5, 0.7, 0.9))


def _experts_of_top_p(answer: Answer, p: Array, threshold: float) -> Report:
    ranked = -np.sort(-p, axis=1)
    before = np.cumsum(ranked, axis=1) - ranked
    right = (before < threshold).sum(1)
    mistakes = {
        "the expert that crosses P belongs to the set; here it is left out.": (before + ranked < threshold).sum(1),
        "a set that reaches P exactly is complete; this takes one expert more.": (before <= threshold).sum(1),
        "this counts the experts whose own probability is at least P; it is their sum that must reach P.": (
            (p >= threshold).sum(1)
        ),
        "the probabilities must be added from the largest to the smallest.": (
            (np.cumsum(p, axis=1) - p < threshold).sum(1)
        ),
        "this counts from the expert that reaches P to the last one; count up to it.": (
            (before + ranked >= threshold).sum(1)
        ),
        "this adds from the smallest to the largest; the fewest experts are the most probable ones.": (
            (np.cumsum(np.sort(p, axis=1), axis=1) - np.sort(p, axis=1) < threshold).sum(1)
        ),
    }
    hints = {hint: wrong for hint, wrong in mistakes.items() if not np.array_equal(wrong, right)}
    return values(
        answer,
        (p, threshold),
        {"experts": right},
        sizes={"N": len(p), "E": p.shape[1]},
        mistakes={"experts": hints},
    )


def entropy_backward(answer: Answer) -> Report:
    """p → dz of the mean entropy of p = softmax(z)."""
    rng = np.random.default_rng(21)
    N, E = 4, 5
    z = 1.5 * rng.standard_normal((N, E))

    def loss(z: Array) -> Array:
        p = _softmax(z)
        return -(p * np.log(p)).sum() / len(p)

    p = _softmax(z)
    log = np.log(p)
    H = -(p * log).sum(1, keepdims=True)
    return gradients(
        answer,
        (p,),
        loss,
        {"z": z},
        sizes={"N": N, "E": E},
        mistakes={
            "dz": {
                "this goes the wrong way: it is the gradient of −H.": p * (log + H) / N,
                "this is the gradient with respect to p; the softmax is left.": -(log + 1) / N,
                "the mean term of the softmax is missing: subtract Σ p dp in each row.": -p * (log + 1) / N,
                "the mean of the softmax must be weighted with p.": -p * (log - log.mean(1, keepdims=True)) / N,
                "1/N from the mean over tokens is missing.": -p * (log + H),
                "this mixes the tokens: each has its own H.": -p * (log + H.mean()) / N,
                "log p + H: the mean of log p is −H, so H is added.": -p * (log - H) / N,
                "p multiplies both, log p and H.": -(p * log + H) / N,
                "the factor p from the softmax is missing.": -(log + H) / N,
                "the 1 of the slope log p + 1 cancels in the softmax: p (log p + H).": -p * (log + 1 + H) / N,
                "H, the mean term of the softmax, is missing.": -p * log / N,
                "H is made with the natural logarithm; this is in bits.": -p * (log + H) / N / np.log(2),
                "a softmax has a slope between its entries too, not only p (1 − p).": -p * (1 - p) * (log + 1) / N,
            }
        },
    )


def _unit(v: Array) -> Array:
    return v / _length(v)


def _length(v: Array) -> Array:
    return np.sqrt((v * v).sum(1, keepdims=True))


def _across(unit: Array, dunit: Array) -> Array:
    return dunit - unit * (unit * dunit).sum(1, keepdims=True)


def _softmax(z: Array) -> Array:
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)
