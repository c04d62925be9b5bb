"""Checks of lesson 20: Switch and GShard."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure

EXCHANGED = "no exchange of two tokens helps any more, but an exchange among three or more does."


def mean_second_weight(answer: Answer) -> Report:
    """(g2, theta) → the mean of w₂ if the second expert is kept with the chance min(1, g₂/θ)."""
    return first_failure(_mean_second_weight(answer, theta) for theta in (0.3, 0.12))


def _mean_second_weight(answer: Answer, theta: float) -> Report:
    g2 = np.array([0.02, 0.09, 0.21, 0.27, 0.38, 0.45])
    chance = np.minimum(1, g2 / theta)
    return values(
        answer,
        (g2, theta),
        {"mean": g2 * chance},
        sizes={"N": len(g2)},
        mistakes={
            "mean": {
                "a chance is at most 1: above θ the second expert is always kept.": g2 * g2 / theta,
                "this is the chance that it is kept; its weight when it is kept is missing.": chance,
                "this is the chance that it is kept, without its limit of 1, and without the weight.": g2 / theta,
                "the chance grows as θ shrinks: divide by θ.": g2 * np.minimum(1, g2 * theta),
                "θ is not a hard limit: below it, the second expert is kept with the chance g₂/θ.": g2 * (g2 > theta),
                "this is θ = 1/2, the paper's value.": 2 * g2 * g2,
                "this is the mean of what is lost; subtract it from g₂.": g2 * (1 - chance),
                "the weight of the second expert is g₂, not 1 − g₂.": (1 - g2) * chance,
                "if the second expert is kept, its weight is g₂; the chance counts only once.": chance * chance,
                "these cases are exchanged: above θ the second expert is always kept.": (
                    np.where(g2 < theta, g2, g2 * g2 / theta)
                ),
                "θ limits the chance, not the weight.": np.minimum(g2, theta),
                "2 g₂ is the paper's chance; here the chance is g₂/θ.": 2 * g2 * chance,
            }
        },
    )


def mean_weights_backward(answer: Answer) -> Report:
    """(g, dw) → dz of w = (g₁, 2 g₂²), with g = softmax(z) over two logits."""
    rng = np.random.default_rng(20)
    N = 5
    z, dw = rng.standard_normal((N, 2)), rng.standard_normal((N, 2))

    def loss(z: Array) -> Array:
        g = _softmax(z)
        return (g[:, 0] * dw[:, 0] + 2 * g[:, 1] ** 2 * dw[:, 1]).sum()

    g = _softmax(z)
    dg = dw * np.stack([np.ones(N), 4 * g[:, 1]], 1)
    w = np.stack([g[:, 0], 2 * g[:, 1] ** 2], 1)
    divided = w / w.sum(1, keepdims=True)

    def through_softmax(dg: Array) -> Array:
        return g * (dg - (g * dg).sum(1, keepdims=True))

    return gradients(
        answer,
        (g, dw),
        loss,
        {"z": z},
        sizes={"N": N},
        mistakes={
            "dz": {
                "g₂ stands twice in 2 g₂²: the chance depends on it too.": (
                    through_softmax(dw * np.stack([np.ones(N), 2 * g[:, 1]], 1))
                ),
                "the slope of 2 g₂² is 4 g₂; a factor of 2 is missing.": (
                    through_softmax(dw * np.stack([np.ones(N), g[:, 1]], 1))
                ),
                "this is the backward pass of w = g: the second weight is 2 g₂² here.": through_softmax(dw),
                "this squares both weights, but the first expert is always kept.": through_softmax(4 * g * dw),
                "this is the gradient with respect to g; the softmax is left.": dg,
                "dz lacks the softmax's mean term: raising one logit lowers the other weight.": g * dg,
                "the mean of the softmax must be weighted with g.": g * (dg - dg.mean(1, keepdims=True)),
                "this treats the second expert as dropped: its weight has a gradient too.": (
                    through_softmax(dw * np.array([1, 0]))
                ),
                "the slope of 2 g₂² depends on g₂: it is 4 g₂.": through_softmax(dw * np.array([1, 2])),
                "the slope of 2 g₂² is 4 g₂, not 4 g₂².": (
                    through_softmax(dw * np.stack([np.ones(N), 4 * g[:, 1] ** 2], 1))
                ),
                "the softmax made g, so its backward pass uses g, not w.": w * (dw - (w * dw).sum(1, keepdims=True)),
                "the two weights are not divided by their sum here.": (
                    divided * (dw - (divided * dw).sum(1, keepdims=True))
                ),
                "each token has a softmax of its own: its mean is over the two experts, not over tokens.": (
                    g * (dg - (g * dg).sum(0))
                ),
                "a softmax has a slope between its entries too, not only g (1 − g).": g * (1 - g) * dg,
            }
        },
    )


def places(answer: Answer) -> Report:
    """(chosen, experts) → each entry's place in the queue of its expert: all first choices before any second, ..."""
    return first_failure(_places(answer, *case) for case in ((7, 3, 2, 0), (9, 5, 4, 1), (8, 4, 3, 2)))


def _places(answer: Answer, N: int, E: int, K: int, seed: int) -> Report:
    chosen = np.argsort(-np.random.default_rng(seed).random((N, E)), axis=1)[:, :K]
    one_hot = np.eye(E, dtype=int)[chosen]  # (N, K, E)
    own = one_hot.cumsum(0)  # within the same choice, the entry itself included
    counts = one_hot.sum(0)  # (K, E)
    before = counts.cumsum(0) - counts  # of all earlier choices
    last = np.concatenate([np.zeros((1, E), int), counts[:-1]])  # of the choice before alone
    reading = one_hot.reshape(-1, E).cumsum(0).reshape(N, K, E)

    def of_entries(queue: Array) -> Array:
        return np.take_along_axis(queue, chosen[:, :, None], axis=2)[:, :, 0]

    right = of_entries(own + before) - 1
    return values(
        answer,
        (chosen, E),
        {"place": right},
        sizes={"N": N, "K": K},
        mistakes={
            "place": _without(
                right,
                {
                    "this counts the choice before alone; the choices before that one keep their places too.": (
                        of_entries(own + last) - 1
                    ),
                    "two entries have the same place: the earlier choices are not counted.": of_entries(own) - 1,
                    "this is reading order; here all first choices come before any second choice.": (
                        of_entries(reading) - 1
                    ),
                    "every place is one too high: the first in a queue has place 0.": right + 1,
                    "the earlier choices end where this choice begins; here its own count is added too.": (
                        of_entries(own + before + counts) - 1
                    ),
                    "this is the order among all entries; every expert has a queue of its own.": (
                        np.arange(N)[:, None] + N * np.arange(K)
                    ),
                    "an expert's second choices follow its own first choices, not those of all tokens.": (
                        of_entries(own) - 1 + N * np.arange(K)
                    ),
                    "this counts the first choices alone; every earlier choice keeps its places.": (
                        of_entries(own + counts[0] * (np.arange(K) > 0)[:, None]) - 1
                    ),
                    "the choices after this one have no places yet; only the earlier ones count.": (
                        of_entries(own + counts.sum(0) - counts) - 1
                    ),
                    "within one choice, tokens come in reading order; here the last token comes first.": (
                        of_entries(own[-1:] - own + one_hot + before) - 1
                    ),
                    "the first choices come first; here the last choices do.": (
                        of_entries(own + counts.sum(0) - counts.cumsum(0)) - 1
                    ),
                },
            )
        },
    )


def balanced_assignment(answer: Answer) -> Report:
    """scores (N, E) → the expert of each token: N/E tokens each, and the largest total score."""
    return first_failure(_balanced_assignment(answer, *case) for case in ((6, 3, 7), (8, 4, 990), (8, 2, 26)))


def _balanced_assignment(answer: Answer, N: int, E: int, seed: int) -> Report:
    scores = np.random.default_rng(seed).integers(0, 100, (N, E)).astype(float)
    everyone = list(_all_balanced([N // E] * E, N))
    totals = [scores[np.arange(N), experts].sum() for experts in everyone]
    best = np.array(everyone[int(np.argmax(totals))])
    greedy, free = np.full(N, -1), [N // E] * E
    for entry in np.argsort(-scores, axis=None, kind="stable"):
        token, expert = divmod(int(entry), E)
        if greedy[token] < 0 and free[expert]:
            greedy[token], free[expert] = expert, free[expert] - 1
    exchanged = _by_exchanges(scores)
    return values(
        answer,
        (scores,),
        {"expert": best},
        sizes={"N": N, "E": E},
        mistakes={
            "expert": {
                "each token took its best expert, so the experts' loads are unequal.": scores.argmax(1),
                "the tokens chose in reading order; an early token took a place that was worth more to a later one.": (
                    _in_turn(scores)
                ),
                "the largest scores were served first; two smaller ones together can be worth more.": greedy,
                "the experts chose in turn; an early expert took a token that was worth more to a later one.": (
                    _by_expert(scores)
                ),
                "this has the smallest total; the scores are to be large.": np.array(everyone[int(np.argmin(totals))]),
            }
            | ({} if np.array_equal(exchanged, best) else {EXCHANGED: exchanged})
        },
        reference="A search through every balanced assignment",
    )


def _all_balanced(free: list[int], left: int) -> Iterator[list[int]]:
    """Every assignment of ``left`` tokens to experts with so many free places."""
    if not left:
        yield []
    for expert, places in enumerate(free):
        if places:
            rest = [*free[:expert], places - 1, *free[expert + 1 :]]
            yield from ([expert, *others] for others in _all_balanced(rest, left - 1))


def _in_turn(scores: Array) -> Array:
    """Each token in reading order takes the best expert that has a free place."""
    free = np.full(scores.shape[1], len(scores) // scores.shape[1])
    experts = []
    for row in scores:
        experts.append(int(np.where(free > 0, row, -np.inf).argmax()))
        free[experts[-1]] -= 1
    return np.array(experts)


def _by_expert(scores: Array) -> Array:
    """Each expert in turn takes the tokens with the highest scores for it that are left."""
    experts = np.full(len(scores), -1)
    for e in range(scores.shape[1]):
        rank = np.argsort(-np.where(experts < 0, scores[:, e], -np.inf), kind="stable")
        experts[rank[: len(scores) // scores.shape[1]]] = e
    return experts


def _by_exchanges(scores: Array) -> Array:
    """Two tokens exchange their experts as long as that helps. This can end before the best assignment."""
    experts = np.repeat(np.arange(scores.shape[1]), len(scores) // scores.shape[1])
    helped = True
    while helped:
        helped = False
        for one, other in combinations(range(len(scores)), 2):
            here, there = experts[[one, other]], experts[[other, one]]
            if scores[[one, other], there].sum() > scores[[one, other], here].sum():
                experts[[one, other]], helped = there, True
    return experts


def _without(right: Array, mistakes: dict[str, Array]) -> dict[str, Array]:
    """The mistakes that give another value than the right one in this case."""
    return {hint: wrong for hint, wrong in mistakes.items() if not np.array_equal(wrong, right)}


def _softmax(z: Array) -> Array:
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)
