"""Wrong answers to the exercises of lesson 24, each with words that its hint must hold, and unusual right ones."""

from fractions import Fraction
from heapq import heapify, heapreplace

import numpy as np

from minimoe.exercises import lesson_24 as check


def dealt(order=lambda counts: np.argsort(-counts, kind="stable"), weight=lambda counts: counts, pick=np.argmin):
    """The right table but for one thing."""

    def balanced_table(counts, E):
        load, experts = np.zeros(E), np.zeros(len(counts), int)
        for token in order(counts):
            experts[token] = pick(load)
            load[experts[token]] += weight(counts)[token]
        return experts

    return balanced_table


def last_of_the_least(load):
    return len(load) - 1 - load[::-1].argmin()


def higher_id_first(counts):
    return np.lexsort((-np.arange(len(counts)), -counts))


def by_frequency(counts, E):
    return dealt()(counts, E)[np.argsort(-counts, kind="stable")]


def back_and_forth(counts, E):
    """0, 1, 2, 2, 1, 0, 0, 1 …, from the most frequent id to the rarest."""
    turns, experts = np.concatenate([np.arange(E), np.arange(E)[::-1]]), np.zeros(len(counts), int)
    experts[np.argsort(-counts, kind="stable")] = np.resize(turns, len(counts))
    return experts


def with_a_heap(counts, E):
    load = [(0, e) for e in range(E)]
    heapify(load)
    experts = [0] * len(counts)
    for token in sorted(range(len(counts)), key=lambda i: (-counts[i], i)):
        least, e = load[0]
        experts[token] = e
        heapreplace(load, (least + int(counts[token]), e))
    return experts


def one_at_a_time(counts, E):
    left, experts = counts.astype(float), -np.ones(len(counts), int)
    while (experts < 0).any():
        token = left.argmax()
        loads = [counts[experts == e].sum() for e in range(E)]
        experts[token], left[token] = loads.index(min(loads)), -np.inf
    return experts


def softmax(z):
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def through(slope, everyone=False, add=True):
    """The right gradient but for ``slope`` of the softmax."""

    def fixed_set_backward(x, W, chosen, dw):
        z = x @ W
        w = np.take_along_axis(softmax(z), chosen, 1) if everyone else softmax(np.take_along_axis(z, chosen, 1))
        dz = slope(w, dw)
        dx, dW = np.zeros_like(x), np.zeros_like(W)
        for t in range(len(x)):
            dx[t] = W[:, chosen[t]] @ dz[t]
            dW[:, chosen[t]] = np.outer(x[t], dz[t]) + (dW[:, chosen[t]] if add else 0)
        return dx, dW

    return fixed_set_backward


def right_slope(w, dw):
    return w * (dw - (w * dw).sum(1, keepdims=True))


def by_jacobian(w, dw):
    return np.stack([(np.diag(p) - np.outer(p, p)) @ d for p, d in zip(w, dw, strict=True)])


def outside_the_set_too(x, W, chosen, dw):
    p, full = softmax(x @ W), np.zeros((len(x), W.shape[1]))
    np.put_along_axis(full, chosen, dw, axis=1)
    dz = right_slope(p, full)
    return dz @ W.T, x.T @ dz


def with_minus_infinity(x, W, chosen, dw):
    """The softmax of all E logits, of which those outside the set are −∞."""
    kept = np.full((len(x), W.shape[1]), -np.inf)
    np.put_along_axis(kept, chosen, 0, axis=1)
    p, full = softmax(x @ W + kept), np.zeros(kept.shape)
    np.put_along_axis(full, chosen, dw, axis=1)
    dz = right_slope(p, full)
    return dz @ W.T, x.T @ dz


def cheap(dx=lambda w, copies: (w * copies).sum(1, keepdims=True), dw=lambda x, w, copies, dy: dy * x):
    """The right gradients but for one of them."""

    def cheap_backward(x, w, copies, dy):
        return dx(w, copies) * dy, copies * dw(x, w, copies, dy).sum(1, keepdims=True)

    return cheap_backward


def zero_as_copy(x, w, copies, dy):
    return cheap()(x, w, np.ones_like(copies), dy)


def weighted_twice(x, w, copies, dy):
    dx, dw = cheap()(x, w, copies, dy)
    return dx, dw * w


def through_a_softmax(x, w, copies, dy):
    dx, dw = cheap()(x, w, copies, dy)
    return dx, right_slope(w, dw)


def one_expert_after_the_other(x, w, copies, dy):
    dx, dw = np.zeros_like(x), np.zeros_like(w)
    for t, k in zip(*np.nonzero(copies), strict=True):
        dx[t] += w[t, k] * dy[t]
        dw[t, k] = dy[t] @ x[t]
    return dx, dw


def with_einsum(x, w, copies, dy):
    return np.einsum("tk,tk,td->td", w, copies, dy), np.einsum("tk,td,td->tk", copies, x, dy)


WRONG = {
    check.balanced_table: [
        (dealt(order=lambda counts: range(len(counts))), "takes the ids in their order"),
        (dealt(order=np.argsort), "begins with the rarest id"),
        (dealt(weight=np.ones_like), "how many ids an expert has"),
        (lambda counts, E: np.arange(len(counts)) % E, "deals the ids out in turns"),
        (dealt(pick=last_of_the_least), "the one with the lowest number takes the id"),
        (dealt(order=higher_id_first), "the lower one comes first"),
        (by_frequency, "entry i must belong to id i"),
        (dealt(pick=np.argmax), ""),
        (back_and_forth, ""),
    ],
    check.fixed_set_backward: [
        (through(lambda w, dw: w * dw), "mean term is missing"),
        (through(lambda w, dw: dw), "the softmax is left"),
        (through(right_slope, everyone=True), "softmax over all E experts"),
        (outside_the_set_too, "outside the set gets no gradient"),
        (through(lambda w, dw: w * (dw - dw.mean(1, keepdims=True))), "weighted with w"),
        (through(lambda w, dw: w * (dw - (w * dw).sum(0))), "not over the tokens"),
        (through(lambda w, dw: -right_slope(w, dw)), "the wrong way"),
        (through(right_slope, add=False), "must be added up"),
    ],
    check.cheap_backward: [
        (zero_as_copy, "a zero expert answers 0"),
        (cheap(dx=lambda w, copies: copies.sum(1, keepdims=True)), "the weight is missing"),
        (weighted_twice, "does not belong here"),
        (cheap(dx=lambda w, copies: (w * copies)[:, :1]), "add up the K parts"),
        (cheap(dx=lambda w, copies: (w * copies).mean(1, keepdims=True)), "y is their sum"),
        (
            cheap(dx=lambda w, copies: (w * copies).sum(1, keepdims=True) / w.sum(1, keepdims=True)),
            "stay as the router gave them",
        ),
        (
            cheap(dw=lambda x, w, copies, dy: dy * (w * copies).sum(1, keepdims=True) * x),
            "the copy itself, x, belongs",
        ),
        (cheap(dw=lambda x, w, copies, dy: x), "the gradient of y is missing"),
        (through_a_softmax, "no softmax follows"),
        (lambda x, w, copies, dy: (cheap()(x, w, copies, x)[0], cheap()(x, w, copies, dy)[1]), "made of dy, not of x"),
        (lambda x, w, copies, dy: cheap()(x, w, ~copies, dy), "not through the copies"),
    ],
    check.loads_at_equal_price: [
        (lambda eta: eta / eta.sum(), "turned round"),
        (lambda eta: 1 / eta, "must add up to 1"),
        (lambda eta: len(eta) / eta / (1 / eta).sum(), "times too much"),
        (lambda eta: np.full(len(eta), 1 / len(eta)), "these loads are equal"),
        (lambda eta: 1 / eta / eta.sum(), "divide by the sum of 1/η"),
        (lambda eta: (1 - eta / eta.sum()) / (len(eta) - 1), "what is left of 1"),
        (lambda eta: softmax(-eta[None])[0], "no softmax"),
    ],
}

RIGHT = {
    check.balanced_table: [with_a_heap, one_at_a_time],
    check.fixed_set_backward: [through(by_jacobian), with_minus_infinity],
    check.cheap_backward: [one_expert_after_the_other, with_einsum],
    check.loads_at_equal_price: [
        lambda eta: np.array([1 / (one * sum(1 / other for other in eta)) for one in eta]),
        lambda eta: [1 / (Fraction(one) * sum(1 / Fraction(other) for other in eta)) for one in eta.tolist()],
    ],
}
