"""Wrong answers to the exercises of lesson 52, each with words that its hint must hold, and unusual right ones."""

from fractions import Fraction

import numpy as np

from minimoe.exercises import lesson_52 as check


def arc(
    weights=lambda t, w: (np.sin((1 - t) * w), np.sin(t * w)),
    over=np.sin,
    cosine=lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b),
    line=lambda a, b, t: (1 - t) * a + t * b,
    unit=False,
    straight=lambda cosine: abs(cosine) > 0.9995,
):
    """The right point but for one thing."""

    def slerp(a, b, t):
        if straight(a @ b / np.linalg.norm(a) / np.linalg.norm(b)):
            return line(a, b, t)
        w = np.arccos(np.clip(cosine(a, b), -1, 1))
        if unit:
            a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
        one, two = weights(t, w)
        return (one * a + two * b) / over(w)

    return slerp


def without_the_line(a, b, t):
    w = np.arccos(min(1.0, a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (np.sin((1 - t) * w) * a + np.sin(t * w) * b) / np.sin(w)


def by_rotation(a, b, t):
    """In the plane of a and b: turn a's direction towards b, and find the two lengths from the two weights."""
    la, lb = np.linalg.norm(a), np.linalg.norm(b)
    first = a / la
    rest = b / lb - (first @ b / lb) * first
    if np.linalg.norm(rest) < 0.03:
        return a + t * (b - a)
    second = rest / np.linalg.norm(rest)
    w = np.arctan2(second @ b, first @ b)
    one, two = np.sin((1 - t) * w) / np.sin(w), np.sin(t * w) / np.sin(w)
    return (one * la + two * lb * np.cos(w)) * first + two * lb * np.sin(w) * second


def with_exponentials(a, b, t):
    w = np.arccos(np.clip(np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)), -1, 1))
    if np.sin(w) < 0.03:
        return np.add((1 - t) * a, t * b)
    return (np.exp(1j * (1 - t) * w).imag * a + np.exp(1j * t * w).imag * b) / np.exp(1j * w).imag


def cut(deltas, keep, size=abs, count=lambda kept: int(kept)):
    trimmed = np.zeros_like(deltas)
    for i, delta in enumerate(deltas):
        largest = np.argsort(-size(delta))[: count(keep * len(delta))]
        trimmed[i, largest] = delta[largest]
    return trimmed


def cut_together(deltas, keep):
    return cut(deltas.reshape(1, -1), keep).reshape(deltas.shape)


def voted(
    trim=cut,
    sign=lambda trimmed, deltas: np.sign(trimmed.sum(0)),
    over=lambda agree: np.maximum(agree.sum(0), 1),
):
    def ties(deltas, keep):
        trimmed = trim(deltas, keep)
        elected = sign(trimmed, deltas)
        agree = (np.sign(trimmed) == elected) & (elected != 0)
        return (trimmed * agree).sum(0) / over(agree)

    return ties


def column_by_column(deltas, keep):
    n, P = deltas.shape
    kept = [set(sorted(range(P), key=lambda j: -abs(delta[j]))[: int(keep * P)]) for delta in deltas]
    merged = []
    for j in range(P):
        found = [delta[j] for delta, of in zip(deltas, kept, strict=True) if j in of]
        total = sum(found)
        same = [one for one in found if one * total > 0]
        merged.append(sum(same) / len(same) if same else 0.0)
    return merged


def by_halves(deltas, keep):
    trimmed = cut(deltas, keep)
    up, down = np.maximum(trimmed, 0), np.minimum(trimmed, 0)
    plus, minus = up.sum(0), -down.sum(0)
    winner = np.where(plus > minus, up, np.where(plus < minus, down, 0))
    count = (winner != 0).sum(0)
    return np.divide(winner.sum(0), count, out=np.zeros(deltas.shape[1]), where=count > 0)


def by_adding_up(E, K, G, renormalize):
    """The weights of K·G of E·G experts at a zero router; each copy is the sum of its slices."""
    weights = np.full(E * G, 1 / (E * G))[: K * G]
    if renormalize:
        weights = weights / weights.sum()
    return 1 / weights.reshape(K, G)[:, 0].sum()


WRONG = {
    check.slerp: [
        (lambda a, b, t: (1 - t) * a + t * b, "this is the straight line"),
        (lambda a, b, t: arc()(a, b, 1 - t), "this is the point at 1 − t"),
        (arc(over=lambda w: 1), "divided by sin ω"),
        (arc(unit=True), "the lengths of a and b are lost"),
        (arc(cosine=lambda a, b: a @ b), "divided by both lengths"),
        (arc(weights=lambda t, w: ((1 - t) * np.sin(w), t * np.sin(w)), over=lambda w: 1), "the sines of (1−t)ω"),
        (arc(line=lambda a, b, t: a), "lie on a line"),
        (without_the_line, ""),
        (arc(straight=lambda cosine: cosine > 0.9995), "opposite vectors lie on a line too"),
        (arc(straight=lambda cosine: cosine > 0.5), "this is the straight line"),
        (arc(straight=lambda cosine: abs(cosine) < 0.9995), "this is the straight line"),
    ],
    check.ties: [
        (lambda deltas, keep: voted()(deltas, 1), "nothing is trimmed"),
        (voted(over=lambda agree: 1), "the sum of those that agree"),
        (voted(over=len), "not by the number of all"),
        (lambda deltas, keep: cut(deltas, keep).mean(0), "leave out those with the other sign"),
        (voted(sign=lambda trimmed, deltas: np.sign(np.sign(trimmed).sum(0))), "each vector has one vote"),
        (voted(sign=lambda trimmed, deltas: np.sign(deltas.sum(0))), "over the trimmed vectors"),
        (voted(trim=lambda deltas, keep: cut(deltas, keep, np.array)), "largest by size"),
        (voted(trim=lambda deltas, keep: cut(deltas, keep, count=round)), "rounds down"),
        (voted(trim=lambda deltas, keep: cut(deltas, keep, count=lambda kept: int(np.ceil(kept)))), "rounds down"),
        (voted(trim=cut_together), "trimmed on its own"),
        (voted(sign=lambda trimmed, deltas: np.where(trimmed.sum(0) >= 0, 1, -1)), "elects no sign"),
        (voted(sign=lambda trimmed, deltas: np.where(trimmed.sum(0) > 0, 1, -1)), "does not elect the minus"),
    ],
    check.w_down_factor: [
        (lambda E, K, G, renormalize: 1, "only 1/G of the weight"),
        (lambda E, K, G, renormalize: E * G / K, "whatever E and K are"),
        (lambda E, K, G, renormalize: G, "the chosen ones add up to K/E"),
        (lambda E, K, G, renormalize: G if renormalize else K / E / G, "turned round"),
        (lambda E, K, G, renormalize: G if renormalize else E * G * G / K, "one G cancels"),
        (lambda E, K, G, renormalize: G if renormalize else E * G, "K are added up"),
    ],
}

RIGHT = {
    check.slerp: [by_rotation, with_exponentials],
    check.ties: [column_by_column, by_halves],
    check.w_down_factor: [
        by_adding_up,
        lambda E, K, G, renormalize: Fraction(1 if renormalize else E, 1 if renormalize else K) * G,
    ],
}
