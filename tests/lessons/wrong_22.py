"""Wrong answers to the exercises of lesson 22, each with words that its hint must hold, and unusual right ones."""

import itertools
from math import comb, factorial, prod

import numpy as np

from minimoe.exercises import lesson_22 as check


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def root(z):
    return np.sqrt(np.log1p(np.exp(z)))


def right_slope(z):
    return sigmoid(z) / (2 * root(z))


def gate(slope=right_slope, r=True, inner=1, mean=True, divided=True, sign=1):
    """The right gradient but for one thing."""

    def root_gate_backward(z, dw, scale):
        s = root(z)
        total = s.sum(1, keepdims=True)
        by_share = (s / total * dw).sum(1, keepdims=True)
        mean_of = {True: by_share, False: 0, "plain": dw.mean(1, keepdims=True), "tokens": (s / total * dw).sum(0)}
        mean_of["sums"] = by_share * total
        ds = (dw - (scale if inner == "r" else 1) * mean_of[mean]) / (total if divided else 1)
        return sign * (scale if r else 1) * ds * slope(z)

    return root_gate_backward


def gate_by_jacobian(z, dw, r):
    dz = []
    for row, given in zip(z, dw, strict=True):
        s = root(row)
        by_s = (np.eye(len(s)) * s.sum() - s[:, None]) / s.sum() ** 2  # ∂w_i/∂s_j at [i, j], before r
        dz.append(r * (given @ by_s) * right_slope(row))
    return np.stack(dz)


def gate_by_logarithm(z, dw, r):
    """w is r times the softmax of log s."""
    v = root(z) / root(z).sum(1, keepdims=True)
    dlogs = r * v * (dw - (v * dw).sum(1, keepdims=True))
    return dlogs * right_slope(z) / root(z)


def gate_by_softplus(z, dw, r):
    s = root(z) ** 2
    v = s / s.sum(1, keepdims=True)
    return r * (dw - (v * dw).sum(1, keepdims=True)) / s.sum(1, keepdims=True) * sigmoid(z)


def gate_of_softmax(z, dw, r):
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return r * p * (dw - (p * dw).sum(1, keepdims=True))


def judged(by):
    """The right choice, but for how a group is judged: ``by(ranked, K/M)``, its scores from the best down."""

    def choose_in_groups(scored, G, M, K):
        N, E = scored.shape
        worth = by(np.sort(scored.reshape(N, G, -1), axis=2)[:, :, ::-1], K // M)
        least = np.sort(worth, axis=1)[:, [-M]]
        inside = np.where((worth >= least).repeat(E // G, axis=1), scored, -np.inf)
        return np.argsort(-inside, axis=1)[:, :K]

    return choose_in_groups


def a_share_of_each(scored, G, M, K):
    """K/M experts from each of the best groups."""
    size, chosen = scored.shape[1] // G, []
    for row in scored:
        parts = [sorted(range(g * size, (g + 1) * size), key=lambda e: -row[e])[: K // M] for g in range(G)]
        best = sorted(parts, key=lambda part: -sum(row[e] for e in part))[:M]
        chosen.append(sorted(sum(best, []), key=lambda e: -row[e]))
    return chosen


def every_gth(scored, G, M, K):
    """As if experts 0, G, 2G, ... were a group."""
    order = np.arange(scored.shape[1]).reshape(-1, G).T.ravel()
    return order[groups()(scored[:, order], G, M, K)]


def groups(best=lambda K, M, size: K // M, outside=-np.inf, sign=1, order=lambda chosen: chosen):
    """The right choice but for one thing."""

    def choose_in_groups(scored, G, M, K):
        N, E = scored.shape
        ranked = np.sort(scored.reshape(N, G, -1), axis=2)[:, :, ::-1]
        worth = ranked[:, :, : best(K, M, E // G)].sum(2)
        kept = np.zeros((N, G), bool)
        np.put_along_axis(kept, np.argsort(-sign * worth, axis=1)[:, :M], True, axis=1)
        inside = np.where(kept.repeat(E // G, axis=1), scored, outside)
        return order(np.argsort(-inside, axis=1, kind="stable")[:, :K])

    return choose_in_groups


def of_all(scored, G, M, K):
    return np.argsort(-scored, axis=1)[:, :K]


def token_by_token(scored, G, M, K):
    size = scored.shape[1] // G
    chosen = []
    for row in scored:
        parts = [sorted(range(g * size, (g + 1) * size), key=lambda e: -row[e]) for g in range(G)]
        best = sorted(parts, key=lambda part: -sum(row[e] for e in part[: K // M]))[:M]
        chosen.append(sorted(sum(best, []), key=lambda e: -row[e])[:K])
    return chosen


def every_pair_of_groups(scored, G, M, K):
    """The M groups with the largest total of their K/M best, found by trying all choices of M groups."""
    N, E = scored.shape
    owner = np.arange(E) // (E // G)
    chosen = np.zeros((N, K), int)
    for t, row in enumerate(scored):
        worth = [np.sort(row[owner == g])[-(K // M) :].sum() for g in range(G)]
        active = max(itertools.combinations(range(G), M), key=lambda some: sum(worth[g] for g in some))
        inside = np.flatnonzero(np.isin(owner, active))
        chosen[t] = inside[np.argsort(-row[inside])][:K]
    return chosen


def by_listing(E, K, G, M):
    size = E // G
    return sum(len({e // size for e in some}) <= M for some in itertools.combinations(range(E), K))


def by_shares(E, K, G, M):
    """How many experts each group gives: every division of K over the groups with at most M that give any."""
    size, total = E // G, 0
    for parts in itertools.product(range(size + 1), repeat=G):
        if sum(parts) == K and sum(part > 0 for part in parts) <= M:
            total += prod(comb(size, part) for part in parts)
    return total


def one_correction(E, K, G, M):
    """Subtracts the sets of M − 1 groups once, however many choices of M groups hold them."""
    return comb(G, M) * comb(M * E // G, K) - comb(G, M - 1) * comb((M - 1) * E // G, K)


def exactly(E, K, G, M):
    return by_listing(E, K, G, M) - (by_listing(E, K, G, M - 1) if M > 1 else 0)


WRONG = {
    check.root_gate_backward: [
        (gate(slope=lambda z: 1), "with respect to s"),
        (gate(slope=sigmoid), "slope of softplus"),
        (gate(slope=lambda z: sigmoid(z) / root(z)), "factor 1/2"),
        (gate(slope=lambda z: sigmoid(z) * sigmoid(-z)), "the slope of a sigmoid; here"),
        (gate(slope=lambda z: root(z) * (1 - root(z))), "a sigmoid only"),
        (gate(r=False), "factor r is missing"),
        (gate(inner="r"), "r counts twice"),
        (gate(mean=False), "weighted with the shares, is missing"),
        (gate(mean="plain"), "must be weighted"),
        (gate(divided=False), "under the fraction"),
        (gate(mean="tokens"), "over tokens"),
        (gate(sign=-1), "sign"),
        (gate(slope=lambda z: 1 / (2 * root(z))), "the sigmoid, as a factor"),
        (gate(slope=lambda z: sigmoid(z) / (2 * root(z) ** 2)), "not softplus"),
        (gate(slope=lambda z: sigmoid(-z) / (2 * root(z))), "not of −z"),
        (gate_by_softplus, "its root is missing"),
        (gate_of_softmax, "a softmax of z"),
        (gate(mean="sums"), "the division by Σs is missing"),
        (lambda z, dw, r: gate()(z, dw, r) / root(z).sum(1, keepdims=True), "twice"),
        (lambda z, dw, r: gate()(z, dw, r) * root(z), "divide by s"),
    ],
    check.choose_in_groups: [
        (groups(outside=0.0), "must score −∞"),
        (groups(best=lambda K, M, size: 1), "not by its best one"),
        (groups(best=lambda K, M, size: size), "not by all of them"),
        (groups(best=lambda K, M, size: 2), "need not be 2"),
        (of_all, "whatever their groups"),
        (groups(sign=-1), "the worst groups"),
        (judged(lambda ranked, few: ranked[:, :, few - 1]), "not by the last of them"),
        (judged(lambda ranked, few: ranked[:, :, -few:].sum(2)), "these are its worst"),
        (judged(lambda ranked, few: ranked[:, :, -1]), "not by its worst one"),
        (a_share_of_each, "belongs to the judging"),
        (every_gth, "are neighbours"),
        (lambda scored, G, M, K: groups(best=lambda *_: K // M)(scored, G, M + 1, K), "more than M groups"),
        (groups(order=lambda chosen: np.sort(chosen, axis=1)), "best comes first."),
        (groups(order=lambda chosen: chosen[:, ::-1]), "not last"),
    ],
    check.choices_in_groups: [
        (lambda E, K, G, M: comb(G, M) * comb(M * E // G, K), "fewer than M groups is counted"),
        (exactly, "fewer groups are allowed"),
        (lambda E, K, G, M: comb(E, K), "as if there were no groups"),
        (lambda E, K, G, M: comb(M * E // G, K), "which ones is a choice too"),
        (lambda E, K, G, M: comb(G, M) * comb(E // G, K // M) ** M, "only one way to divide"),
        (lambda E, K, G, M: by_listing(E, K, G, M) * factorial(K), "a set has none"),
        (lambda E, K, G, M: sum(comb(G, j) * comb(j * E // G, K) for j in range(1, M + 1)), "adds up sets"),
        (one_correction, "taking it away once"),
        (lambda E, K, G, M: comb(E, K) - by_listing(E, K, G, M), "the others are allowed"),
        (lambda E, K, G, M: by_listing(E, K, G, M) / comb(E, K), "this is a share"),
    ],
}

RIGHT = {
    check.root_gate_backward: [gate_by_jacobian, gate_by_logarithm],
    check.choose_in_groups: [token_by_token, every_pair_of_groups],
    check.choices_in_groups: [by_listing, by_shares],
}
