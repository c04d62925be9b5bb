"""Checks of lesson 60: adaptive mixtures."""

from __future__ import annotations

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure


def competitive_backward(answer: Answer) -> Report:
    """(p, o, d) → ds and do of Σ over cases and experts of p ‖d − o‖², with p the softmax of s."""
    rng = np.random.default_rng(60)
    N, E, M = 5, 4, 3
    s, o, d = rng.standard_normal((N, E)), rng.standard_normal((N, E, M)), rng.standard_normal((N, M))
    p = _softmax(s)
    away = d[:, None] - o
    squares = (away**2).sum(2)
    mean = (p * squares).sum(1, keepdims=True)
    h = p * np.exp(-squares / 2)
    h /= h.sum(1, keepdims=True)
    blend = (p[..., None] * o).sum(1)

    def loss(s: Array, o: Array) -> Array:
        return (_softmax(s) * ((d[:, None] - o) ** 2).sum(2)).sum()

    return gradients(
        answer,
        (p, o, d),
        loss,
        {"s": s, "o": o},
        sizes={"N": N, "E": E, "M": M},
        mistakes={
            "ds": {
                "this is the gradient with respect to p; the softmax is left.": squares,
                "ds lacks the softmax's mean term: a logit that rises lowers all other p.": p * squares,
                "this goes the wrong way: the logit of an expert that is better than the mean must get a negative "
                "gradient.": p * (mean - squares),
                "the mean of the softmax must be weighted with p.": p * (squares - squares.mean(1, keepdims=True)),
                "this is the gate of the mixture error, p − h; here no posterior is needed.": p - h,
                "this is the gate of the cooperative error, which sees only the blend.": (
                    -2 * p * ((o - blend[:, None]) * (d - blend)[:, None]).sum(2)
                ),
                "a logit changes all p: the mean term adds up p ‖d − o‖² over the experts.": p * squares * (1 - p),
                "use ‖d − o‖², not ‖d − o‖.": p * (np.sqrt(squares) - (p * np.sqrt(squares)).sum(1, keepdims=True)),
                "compare an expert with the mean error of the experts, not with the error of the blend.": (
                    p * (squares - ((d - blend) ** 2).sum(1, keepdims=True))
                ),
            },
            "do": {
                "the factor 2 of the square is missing.": -p[..., None] * away,
                "do has the wrong sign: o grows towards d when you go against the gradient.": 2 * p[..., None] * away,
                "the weight p is missing: an expert is asked as often as the gate trusts it.": -2 * away,
                "the weight is p, not p².": -2 * p[..., None] ** 2 * away,
                "each expert has its own residual d − o_i; this is the residual of the blend.": (
                    -2 * p[..., None] * (d - blend)[:, None]
                ),
                "this weighs with the posterior, as the mixture error does; here the weight is p.": (
                    -2 * h[..., None] * away
                ),
            },
        },
    )


def class_mixture_backward(answer: Answer) -> Report:
    """(p, pi, labels) → ds and dz of −Σ log Σ_i p_i π_i[label], with p and π the softmaxes of s and z."""
    rng = np.random.default_rng(61)
    N, E, M = 6, 3, 4
    s, z = rng.standard_normal((N, E)), rng.standard_normal((N, E, M))
    labels = np.array([3, 0, 1, 1, 2, 0])
    p, pi = _softmax(s), _softmax(z)
    onehot = np.eye(M)[labels]
    said = pi[np.arange(N), :, labels]  # (N, E)
    total = (p * said).sum(1, keepdims=True)
    h = p * said / total
    away = pi - onehot[:, None]
    blend = (p[..., None] * pi).sum(1)

    def loss(s: Array, z: Array) -> Array:
        right = _softmax(z)[np.arange(N), :, labels]
        return -np.log((_softmax(s) * right).sum(1)).sum()

    return gradients(
        answer,
        (p, pi, labels),
        loss,
        {"s": s, "z": z},
        sizes={"N": N, "E": E, "M": M},
        mistakes={
            "ds": {
                "ds has the wrong sign: the gate moves towards the posterior.": h - p,
                "ds lacks the prior: it comes from the sum that divides the softmax.": -h,
                "this is the gradient with respect to p; the softmax is left.": -said / total,
                "the posterior must add up to 1 over the experts: divide by Σ p π.": p - p * said,
                "this is for Σ p (−log π), the mean of the logarithms; the error is −log Σ p π, the log of the mean.": (
                    p * ((p * np.log(said)).sum(1, keepdims=True) - np.log(said))
                ),
                "this gives the whole case to the likeliest expert; h shares it out.": p - _largest(h),
                "this posterior forgets the prior: it must be proportional to p π, not to π alone.": (
                    p - said / said.sum(1, keepdims=True)
                ),
            },
            "dz": {
                "this weighs with the prior p: use the posterior h.": p[..., None] * away,
                "the weight h is missing: an expert is asked as far as it was responsible.": away,
                "the posterior must add up to 1 over the experts: divide by Σ p π.": (p * said)[..., None] * away,
                "this gives the whole case to the likeliest expert; h shares it out.": _largest(h)[..., None] * away,
                "dz has the wrong sign.": -h[..., None] * away,
                "this compares the blend with the class, but each expert has its own π.": (
                    h[..., None] * (blend - onehot)[:, None]
                ),
                "only the logit of the right class moves here, but π has all logits in it.": (
                    h[..., None] * away * onehot[:, None]
                ),
                "this is the gradient with respect to π; the softmax of each expert is left.": (
                    -(p / total)[..., None] * onehot[:, None]
                ),
            },
        },
    )


def posterior_at(answer: Answer) -> Report:
    """(p, o, d, variance) → h, even where every density is too small for a floating-point number."""
    return first_failure(_posterior_at(answer, *case) for case in ((0.4, 0.0), (2.5, 0.0), (0.01, 30.0)))


def _posterior_at(answer: Answer, variance: float, far: float) -> Report:
    rng = np.random.default_rng(62)
    N, E, M = 5, 3, 2
    p, o = _softmax(rng.standard_normal((N, E))), rng.standard_normal((N, E, M))
    d = rng.standard_normal((N, M)) + far
    squares = ((d[:, None] - o) ** 2).sum(2)

    def from_logs(logs: Array, axis: int = 1) -> Array:
        h: Array = np.exp(logs - logs.max(axis, keepdims=True))
        return h / h.sum(axis, keepdims=True)

    right = from_logs(np.log(p) - squares / (2 * variance))
    mistakes = {
        "this is the posterior at a variance of 1.": from_logs(np.log(p) - squares / 2),
        "the half in the exponent is missing: it is ‖d − o‖²/2σ².": from_logs(np.log(p) - squares / variance),
        "the variance is σ² already: do not square it.": from_logs(np.log(p) - squares / (2 * variance**2)),
        "the variance is σ² already, not σ⁴: do not take its root.": from_logs(
            np.log(p) - squares / (2 * np.sqrt(variance))
        ),
        "the prior is missing: h is proportional to p times the density.": from_logs(-squares / (2 * variance)),
        "this is the prior: the target has not been used.": p,
        "this favours the expert that is farthest away: the exponent is negative.": from_logs(
            np.log(p) + squares / (2 * variance)
        ),
        "h must add up to 1 over the experts of each case, not over the cases.": from_logs(
            np.log(p) - squares / (2 * variance), axis=0
        ),
        "use ‖d − o‖², not ‖d − o‖.": from_logs(np.log(p) - np.sqrt(squares) / (2 * variance)),
        "the logarithm of p is missing: log (p · density) is log p + the exponent.": (
            from_logs(p - squares / (2 * variance))
        ),
        "this gives the whole case to the nearest expert; h shares it out.": _largest(-squares),
    }
    ordinary = far == 0  # far away, many mistakes give the same certain posterior
    hidden = {
        "every density is 0 here, and a tiny number in the sum hides it: subtract the largest exponent of each case "
        "before exp.": np.zeros((N, E)),
        "every density is 0 here, and a tiny number in its place leaves only the prior: subtract the largest exponent "
        "of each case before exp.": p,
    }
    return values(
        answer,
        (p, o, d, variance),
        {"h": right},
        sizes={"N": N, "E": E, "M": M},
        mistakes={"h": mistakes if ordinary else hidden},
        shares=("h",),
    )


def _largest(x: Array) -> Array:
    """x (N, E) → 1 at the largest entry of each row, 0 elsewhere."""
    return np.eye(x.shape[1])[x.argmax(1)]


def _softmax(x: Array) -> Array:
    power: Array = np.exp(x - x.max(-1, keepdims=True))
    return power / power.sum(-1, keepdims=True)
