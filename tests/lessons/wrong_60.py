"""Wrong answers to the exercises of lesson 60, each with words that its hint must hold, and unusual right ones."""

import numpy as np

from minimoe.exercises import lesson_60 as check


def competitive(gate=None, output=None):
    """The right gradients but for one: each is a function of p, the residuals and their squares."""

    def competitive_backward(p, o, d):
        away = d[:, None] - o
        squares = (away**2).sum(2)
        ds = p * (squares - (p * squares).sum(1, keepdims=True)) if gate is None else gate(p, squares)
        return ds, -2 * p[..., None] * away if output is None else output(p, away)

    return competitive_backward


def by_the_blend(p, o, d):
    r = d - (p[..., None] * o).sum(1)
    return competitive()(p, o, d)[0], -2 * p[..., None] * r[:, None]


def cooperative_gate(p, o, d):
    blend = (p[..., None] * o).sum(1)
    ds = -2 * p * np.einsum("nem,nm->ne", o - blend[:, None], d - blend)
    return ds, competitive()(p, o, d)[1]


def by_the_blends_error(p, o, d):
    squares = ((d[:, None] - o) ** 2).sum(2)
    r = d - (p[..., None] * o).sum(1)
    return p * (squares - (r**2).sum(1, keepdims=True)), competitive()(p, o, d)[1]


def posterior_of(p, squares):
    h = p * np.exp(-squares / 2)
    return h / h.sum(1, keepdims=True)


def competitive_by_jacobian(p, o, d):
    squares = ((d[:, None] - o) ** 2).sum(2)
    ds = [(np.diag(row) - np.outer(row, row)) @ one for row, one in zip(p, squares, strict=True)]
    return np.stack(ds), 2 * np.einsum("ne,nem->nem", p, o - d[:, None])


def competitive_by_loop(p, o, d):
    ds, do = np.zeros(p.shape), np.zeros(o.shape)
    for n in range(len(p)):
        squares = [((d[n] - one) ** 2).sum() for one in o[n]]
        for e in range(len(squares)):
            ds[n, e] = p[n, e] * (squares[e] - p[n] @ squares)
            do[n, e] = 2 * p[n, e] * (o[n, e] - d[n])
    return ds, do


def classes(gate=None, output=None):
    """The right gradients but for one: each is a function of p, h, π, the one-hot classes and what was said of them."""

    def class_mixture_backward(p, pi, labels):
        said = pi[np.arange(len(p)), :, labels]
        h = p * said / (p * said).sum(1, keepdims=True)
        onehot = np.eye(pi.shape[2])[labels][:, None]
        ds = p - h if gate is None else gate(p, h, said)
        return ds, h[..., None] * (pi - onehot) if output is None else output(p, h, pi, onehot)

    return class_mixture_backward


def mean_of_logs(p, h, said):
    return p * ((p * np.log(said)).sum(1, keepdims=True) - np.log(said))


def not_divided(p, h, pi, onehot):
    return (p * (pi * onehot).sum(2))[..., None] * (pi - onehot)


def classes_through_softmax(p, pi, labels):
    """With respect to p and π first, then through both softmaxes."""
    said = np.take_along_axis(pi, labels[:, None, None], axis=2)[..., 0]
    dp = -said / (p * said).sum(1, keepdims=True)
    dpi = np.zeros_like(pi)
    for n, label in enumerate(labels):
        dpi[n, :, label] = -p[n] / (p[n] @ said[n])
    return p * (dp - (p * dp).sum(1, keepdims=True)), pi * (dpi - (pi * dpi).sum(2, keepdims=True))


def classes_by_loop(p, pi, labels):
    ds, dz = p.copy(), np.zeros(pi.shape)
    for n, label in enumerate(labels):
        total = sum(p[n, e] * pi[n, e, label] for e in range(p.shape[1]))
        for e in range(p.shape[1]):
            h = p[n, e] * pi[n, e, label] / total
            ds[n, e] -= h
            dz[n, e] = h * pi[n, e]
            dz[n, e, label] -= h
    return ds, dz


def at(exponent, prior=True, axis=1, log=np.log):
    """The posterior with another exponent."""

    def posterior_at(p, o, d, variance):
        logs = log(p) * prior + exponent(((d[:, None] - o) ** 2).sum(2), variance)
        h = np.exp(logs - logs.max(axis, keepdims=True))
        return h / h.sum(axis, keepdims=True)

    return posterior_at


def plainly(p, o, d, variance):
    """Right on paper, but far from the target, all densities are 0."""
    with np.errstate(all="ignore"):
        h = p * np.exp(-((d[:, None] - o) ** 2).sum(2) / (2 * variance))
        return h / h.sum(1, keepdims=True)


def with_a_tiny_number_added(p, o, d, variance):
    h = p * np.exp(-((d[:, None] - o) ** 2).sum(2) / (2 * variance))
    return h / (h.sum(1, keepdims=True) + 1e-12)


def with_densities_of_at_least_a_tiny_number(p, o, d, variance):
    h = p * np.maximum(np.exp(-((d[:, None] - o) ** 2).sum(2) / (2 * variance)), 1e-300)
    return h / h.sum(1, keepdims=True)


def by_differences(p, o, d, variance):
    """1 / Σ_j of the ratio of j to i: a ratio may overflow to ∞, and 1/∞ is 0, as it should be."""
    logs = np.log(p) - ((d[:, None] - o) ** 2).sum(2) / (2 * variance)
    with np.errstate(over="ignore"):
        return 1 / np.exp(logs[:, None] - logs[:, :, None]).sum(2)


def by_logaddexp(p, o, d, variance):
    logs = np.log(p) - ((d[:, None] - o) ** 2).sum(2) / (2 * variance)
    return np.exp(logs - np.logaddexp.reduce(logs, axis=1)[:, None])


WRONG = {
    check.competitive_backward: [
        (competitive(gate=lambda p, squares: squares), "the softmax is left"),
        (competitive(gate=lambda p, squares: p * squares), "lacks the softmax's mean"),
        (competitive(gate=lambda p, squares: p * ((p * squares).sum(1, keepdims=True) - squares)), "wrong way"),
        (competitive(gate=lambda p, squares: p * (squares - squares.mean(1, keepdims=True))), "weighted with p"),
        (competitive(gate=lambda p, squares: p - posterior_of(p, squares)), "no posterior is needed"),
        (by_the_blends_error, "not with the error of the blend"),
        (cooperative_gate, "sees only the blend"),
        (competitive(gate=lambda p, squares: p * squares * (1 - p)), "adds up p"),
        (competitive(gate=lambda p, squares: p * (squares**0.5 - (p * squares**0.5).sum(1, keepdims=True))), "not ‖d"),
        (competitive(output=lambda p, away: -2 * (p**2)[..., None] * away), "not p²"),
        (competitive(output=lambda p, away: -p[..., None] * away), "factor 2"),
        (competitive(output=lambda p, away: 2 * p[..., None] * away), "wrong sign"),
        (competitive(output=lambda p, away: -2 * away), "weight p is missing"),
        (
            competitive(output=lambda p, away: -2 * posterior_of(p, (away**2).sum(2))[..., None] * away),
            "here the weight is p",
        ),
        (by_the_blend, "residual of the blend"),
    ],
    check.class_mixture_backward: [
        (classes(gate=lambda p, h, said: h - p), "towards the posterior"),
        (classes(gate=lambda p, h, said: -h), "lacks the prior"),
        (classes(gate=lambda p, h, said: -said / (p * said).sum(1, keepdims=True)), "the softmax is left"),
        (classes(gate=lambda p, h, said: p - p * said), "divide by Σ p π"),
        (classes(gate=lambda p, h, said: p - said / said.sum(1, keepdims=True)), "forgets the prior"),
        (classes(output=lambda p, h, pi, onehot: p[..., None] * (pi - onehot)), "use the posterior"),
        (classes(gate=mean_of_logs), "the log of the mean"),
        (classes(gate=lambda p, h, said: p - (h == h.max(1, keepdims=True))), "h shares it out"),
        (classes(output=lambda p, h, pi, onehot: (h == h.max(1, keepdims=True))[..., None] * (pi - onehot)), "shares"),
        (classes(output=not_divided), "divide by Σ p π"),
        (classes(output=lambda p, h, pi, onehot: pi - onehot), "weight h is missing"),
        (classes(output=lambda p, h, pi, onehot: h[..., None] * (onehot - pi)), "wrong sign"),
        (classes(output=lambda p, h, pi, onehot: h[..., None] * (pi - onehot) * onehot), "all logits"),
        (
            classes(
                output=lambda p, h, pi, onehot: h[..., None] * ((p[..., None] * pi).sum(1, keepdims=True) - onehot)
            ),
            "its own π",
        ),
        (
            classes(output=lambda p, h, pi, onehot: -(h / (pi * onehot).sum(2))[..., None] * onehot),
            "softmax of each expert is left",
        ),
    ],
    check.posterior_at: [
        (at(lambda squares, variance: -squares / 2), "variance of 1"),
        (at(lambda squares, variance: -squares / variance), "the half"),
        (at(lambda squares, variance: -squares / (2 * variance**2)), "do not square"),
        (at(lambda squares, variance: -squares / (2 * variance**0.5)), "do not take its root"),
        (at(lambda squares, variance: -squares / (2 * variance), prior=False), "prior is missing"),
        (lambda p, o, d, variance: p, "has not been used"),
        (at(lambda squares, variance: squares / (2 * variance)), "exponent is negative"),
        (at(lambda squares, variance: -squares / (2 * variance), axis=0), "not over the cases"),
        (at(lambda squares, variance: -np.sqrt(squares) / (2 * variance)), "not ‖d − o‖."),
        (at(lambda squares, variance: -squares / (2 * variance), log=lambda p: p), "logarithm of p is missing"),
        (lambda p, o, d, variance: np.eye(p.shape[1])[((d[:, None] - o) ** 2).sum(2).argmin(1)], "shares it out"),
        (plainly, "not finite"),
        (with_a_tiny_number_added, "in the sum hides it"),
        (with_densities_of_at_least_a_tiny_number, "leaves only the prior"),
    ],
}

RIGHT = {
    check.competitive_backward: [competitive_by_jacobian, competitive_by_loop],
    check.class_mixture_backward: [classes_through_softmax, classes_by_loop],
    check.posterior_at: [by_differences, by_logaddexp],
}
