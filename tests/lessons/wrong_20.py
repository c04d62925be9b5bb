"""Wrong answers to the exercises of lesson 20, each with words that its hint must hold, and unusual right ones."""

from itertools import permutations

import numpy as np

from minimoe.exercises import lesson_20 as check


def pair(g, dg, mean=None):
    mean = (g * dg).sum(1, keepdims=True) if mean is None else mean
    return g * (dg - mean)


def slope(first, second):
    """dg = dw times what ``first`` and ``second`` make of g."""
    return lambda g, dw: pair(g, np.stack([first(g[:, 0]) * dw[:, 0], second(g[:, 1]) * dw[:, 1]], 1))


def one(g):
    return np.ones_like(g)


def right_dg(g, dw):
    return np.stack([dw[:, 0], 4 * g[:, 1] * dw[:, 1]], 1)


def one_by_one(g, dw):
    dz = np.zeros_like(g)
    for n in range(len(g)):
        jacobian = np.diag(g[n]) - np.outer(g[n], g[n])
        dz[n] = jacobian @ [dw[n, 0], 4 * g[n, 1] * dw[n, 1]]
    return dz


def by_difference(g, dw):
    """Both logits get the same push with opposite signs, because only their difference matters."""
    push = g[:, 0] * g[:, 1] * (dw[:, 0] - 4 * g[:, 1] * dw[:, 1])
    return np.stack([push, -push], 1)


def queue(before=lambda counts, k: counts[:k].sum(0), first=0):
    """Places choice by choice, after as many of the ``before`` ones."""

    def places(chosen, experts):
        counts = np.stack([np.bincount(column, minlength=experts) for column in chosen.T])
        place = np.zeros_like(chosen)
        for k, column in enumerate(chosen.T):
            for n, e in enumerate(column):
                place[n, k] = before(counts, k)[e] + (column[:n] == e).sum() + first
        return place

    return places


def last_choice_only(counts, k):
    return counts[k - 1] if k else np.zeros(counts.shape[1], int)


def reading(chosen, experts):
    flat = chosen.reshape(-1)
    return np.array([(flat[:i] == e).sum() for i, e in enumerate(flat)]).reshape(chosen.shape)


def by_dictionary(chosen, experts):
    waiting, place = dict.fromkeys(range(experts), 0), [[0] * chosen.shape[1] for _ in chosen]
    for k in range(chosen.shape[1]):
        for n in range(len(chosen)):
            e = int(chosen[n, k])
            place[n][k], waiting[e] = waiting[e], waiting[e] + 1
    return place


def by_sorting(chosen, experts):
    line = chosen.T.reshape(-1)
    order = np.argsort(line, kind="stable")
    starts = np.searchsorted(line[order], np.arange(experts))
    place = np.empty_like(line)
    place[order] = np.arange(len(line)) - starts[line[order]]
    return place.reshape(chosen.shape[::-1]).T


def largest_first(scores):
    N, E = scores.shape
    free, expert = [N // E] * E, [None] * N
    for _, n, e in sorted((-scores[n, e], n, e) for n in range(N) for e in range(E)):
        if expert[n] is None and free[e]:
            expert[n], free[e] = e, free[e] - 1
    return expert


def tokens_in_turn(scores):
    free, expert = [len(scores) // scores.shape[1]] * scores.shape[1], []
    for row in scores:
        best = max((e for e, places in enumerate(free) if places), key=lambda e: row[e])
        expert.append(best)
        free[best] -= 1
    return expert


def experts_in_turn(scores):
    N, E = scores.shape
    left, expert = set(range(N)), [0] * N
    for e in range(E):
        for n in sorted(left, key=lambda n: -scores[n, e])[: N // E]:
            expert[n] = e
            left.remove(n)
    return expert


def pairs_exchanged(scores):
    """Two tokens exchange their experts for as long as one exchange helps."""
    N, E = scores.shape
    expert = np.repeat(np.arange(E), N // E)
    improved = True
    while improved:
        improved = False
        for i, j in permutations(range(N), 2):
            if scores[i, expert[j]] + scores[j, expert[i]] > scores[i, expert[i]] + scores[j, expert[j]]:
                expert[[i, j]], improved = expert[[j, i]], True
    return expert


def backwards(tokens=1, choices=1):
    """Places if the last tokens, or the last choices, come first."""

    def places(chosen, experts):
        return by_sorting(chosen[::tokens, ::choices], experts)[::tokens, ::choices]

    return places


def mean_weights(g):
    return np.stack([g[:, 0], 2 * g[:, 1] ** 2], 1)


def by_search(scores):
    """A cycle of exchanges for as long as one helps: pairs and triples are enough for so few tokens."""
    N, E = scores.shape
    expert = np.repeat(np.arange(E), N // E)
    improved = True
    while improved:
        improved = False
        for cycle in (c for size in (2, 3, 4) for c in permutations(range(N), size)):
            moved = expert.copy()
            moved[list(cycle)] = expert[list(cycle[1:] + cycle[:1])]
            if scores[np.arange(N), moved].sum() > scores[np.arange(N), expert].sum():
                expert, improved = moved, True
    return expert


def by_table(scores):
    """The best total for the first tokens and each number of places that are left."""
    N, E = scores.shape
    best = {(N // E,) * E: (0.0, [])}
    for row in scores:
        longer = {}
        for free, (total, experts) in best.items():
            for e in range(E):
                rest = (*free[:e], free[e] - 1, *free[e + 1 :])
                if free[e] and (rest not in longer or longer[rest][0] < total + row[e]):
                    longer[rest] = (total + row[e], [*experts, e])
        best = longer
    return best[(0,) * E][1]


WRONG = {
    check.mean_second_weight: [
        (lambda g2, theta: g2 * g2 / theta, "a chance is at most 1"),
        (lambda g2, theta: np.minimum(1, g2 / theta), "its weight when it is kept is missing"),
        (lambda g2, theta: g2 / theta, "without its limit of 1"),
        (lambda g2, theta: g2 * np.minimum(1, g2 * theta), "divide by θ"),
        (lambda g2, theta: g2 * (g2 > theta), "not a hard limit"),
        (lambda g2, theta: 2 * g2**2, "the paper's value"),
        (lambda g2, theta: g2 - g2 * np.minimum(1, g2 / theta), "what is lost"),
        (lambda g2, theta: (1 - g2) * np.minimum(1, g2 / theta), "not 1 − g₂"),
        (lambda g2, theta: np.where(g2 > theta, 1, g2 / theta) ** 2, "counts only once"),
        (lambda g2, theta: np.where(g2 > theta, g2**2 / theta, g2), "exchanged"),
        (lambda g2, theta: np.minimum(g2, theta), "not the weight"),
        (lambda g2, theta: 2 * g2 * np.minimum(1, g2 / theta), "the paper's chance"),
    ],
    check.mean_weights_backward: [
        (slope(one, lambda g: 2 * g), "the chance depends on it too"),
        (slope(one, lambda g: g), "a factor of 2 is missing"),
        (slope(one, one), "the second weight is 2 g₂² here"),
        (slope(lambda g: 4 * g, lambda g: 4 * g), "always kept"),
        (slope(one, lambda g: 0 * g), "its weight has a gradient too"),
        (right_dg, "the softmax is left"),
        (lambda g, dw: pair(g, right_dg(g, dw), 0), "lacks the softmax's mean"),
        (lambda g, dw: pair(g, right_dg(g, dw), right_dg(g, dw).mean(1, keepdims=True)), "weighted with g"),
        (slope(one, lambda g: 2 * one(g)), "it is 4 g₂."),
        (slope(one, lambda g: 4 * g**2), "not 4 g₂²"),
        (lambda g, dw: pair(mean_weights(g), dw), "uses g, not w"),
        (lambda g, dw: pair(mean_weights(g) / mean_weights(g).sum(1, keepdims=True), dw), "not divided by their sum"),
        (lambda g, dw: pair(g, right_dg(g, dw), (g * right_dg(g, dw)).sum(0)), "not over tokens"),
        (lambda g, dw: g * (1 - g) * right_dg(g, dw), "between its entries"),
    ],
    check.places: [
        (queue(last_choice_only), "the choice before alone"),
        (queue(lambda counts, k: 0 * counts[0]), "the same place"),
        (reading, "this is reading order"),
        (queue(first=1), "one too high"),
        (queue(lambda counts, k: counts[: k + 1].sum(0)), "its own count is added too"),
        (lambda chosen, experts: np.arange(chosen.size).reshape(chosen.shape[::-1]).T, "a queue of its own"),
        (queue(lambda counts, k: np.full(counts.shape[1], counts[:k].sum())), "not those of all tokens"),
        (queue(lambda counts, k: counts[0] * (k > 0)), "the first choices alone"),
        (queue(lambda counts, k: counts.sum(0) - counts[k]), "only the earlier ones"),
        (backwards(tokens=-1), "the last token comes first"),
        (backwards(choices=-1), "here the last choices do"),
    ],
    check.balanced_assignment: [
        (lambda scores: scores.argmax(1), "loads are unequal"),
        (tokens_in_turn, "in reading order"),
        (largest_first, "served first"),
        (experts_in_turn, "the experts chose in turn"),
        (pairs_exchanged, "no exchange of two tokens helps"),
        (lambda scores: by_table(-scores), "smallest total"),
    ],
}

RIGHT = {
    check.mean_second_weight: [
        lambda g2, theta: np.where(g2 > theta, g2, g2**2 / theta),
        lambda g2, theta: [g * min(1.0, g / theta) for g in g2],
    ],
    check.mean_weights_backward: [one_by_one, by_difference],
    check.places: [by_dictionary, by_sorting],
    check.balanced_assignment: [by_search, by_table],
}
