"""Checks of lesson 22: balance without a loss."""

from __future__ import annotations

from math import comb

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure


def root_gate_backward(answer: Answer) -> Report:
    """(z, dw, r) → dz of the weights w = r s/Σs, s = √softplus(z), of the chosen experts."""
    rng = np.random.default_rng(22)
    N, K, r = 5, 3, 2.5
    z, dw = 1.5 * rng.standard_normal((2, N, K))

    def score(z: Array) -> Array:
        s: Array = np.sqrt(np.log1p(np.exp(z)))
        return s

    def loss(z: Array) -> Array:
        s = score(z)
        return (dw * r * s / s.sum(1, keepdims=True)).sum()

    s, up = score(z), 1 / (1 + np.exp(-z))  # the slope of softplus is the sigmoid
    slope, total = up / (2 * s), s.sum(1, keepdims=True)
    share = s / total
    centred = dw - (share * dw).sum(1, keepdims=True)
    right = r / total * centred * slope
    return gradients(
        answer,
        (z, dw, r),
        loss,
        {"z": z},
        sizes={"N": N, "K": K},
        mistakes={
            "dz": {
                "this is the gradient with respect to s; the slope ds/dz is left.": r / total * centred,
                "this is the slope of softplus; s is its root.": r / total * centred * up,
                "the root's factor 1/2 is missing.": 2 * right,
                "this is the slope of a sigmoid; here s is √softplus(z).": r / total * centred * up * (1 - up),
                "s(1 − s) is the slope of a sigmoid only; here s is √softplus(z).": r / total * centred * s * (1 - s),
                "the factor r is missing.": right / r,
                "r counts twice: does your mean of dw use w = r s/Σs, which adds up to r?": (
                    r / total * slope * (dw - r * (share * dw).sum(1, keepdims=True))
                ),
                "each weight depends on all chosen scores: the mean of dw, weighted with the shares, is missing.": (
                    r / total * slope * dw
                ),
                "the mean of dw must be weighted with the shares s/Σs.": (
                    r / total * slope * (dw - dw.mean(1, keepdims=True))
                ),
                "the sum over the chosen scores is missing under the fraction.": right * total,
                "the mean is over the experts of a token, but this one is over tokens.": (
                    r / total * slope * (dw - (share * dw).sum(0))
                ),
                "the sign is wrong.": -right,
                "the slope of the root has softplus's own slope, the sigmoid, as a factor.": (
                    r / total * centred / (2 * s)
                ),
                "the slope of a root is 1/(2 s), with s the root itself, not softplus.": right / s,
                "the slope of softplus is the sigmoid of z, not of −z.": r / total * centred * (1 - up) / (2 * s),
                "this is the backward pass for s = softplus(z); its root is missing.": (
                    _sum_backward(s * s, dw, r) * up
                ),
                "this is the backward pass of a softmax of z; here w = r s/Σs.": _softmax_backward(z, dw, r),
                "the mean of dw is weighted with s/Σs; the division by Σs is missing.": (
                    r / total * slope * (dw - (s * dw).sum(1, keepdims=True))
                ),
                "1/Σs stands twice.": right / total,
                "this is the gradient with respect to log s, times the slope of s; divide by s.": right * s,
            }
        },
    )


def choose_in_groups(answer: Answer) -> Report:
    """(scored, G, M, K) → the K experts (N, K) of each token within its M best groups, best first."""
    return first_failure(_choose_in_groups(answer, *case) for case in ((20, 4, 2, 4, 0.0), (12, 3, 1, 3, 2.0)))


def _choose_in_groups(answer: Answer, experts: int, G: int, M: int, K: int, lower: float) -> Report:
    rng = np.random.default_rng(22)
    N = 40
    scored = rng.random((N, experts)) + 0.4 * rng.standard_normal(experts) - lower  # negative in the second case
    by_group = np.sort(scored.reshape(N, G, -1), axis=2)[:, :, ::-1]

    def within(worth: Array, active: int = M) -> Array:
        kept = np.zeros((N, G), bool)
        np.put_along_axis(kept, np.argsort(-worth, axis=1)[:, :active], True, axis=1)
        return kept.repeat(experts // G, axis=1)

    def chosen(worth: Array, outside: float = -np.inf, active: int = M) -> Array:
        return _best(np.where(within(worth, active), scored, outside), K)

    inside = within(by_group[:, :, : K // M].sum(2))
    right = chosen(by_group[:, :, : K // M].sum(2))
    return values(
        answer,
        (scored, G, M, K),
        {"chosen": right},
        sizes={"N": N, "K": K},
        mistakes={
            "chosen": _without(
                right,
                {
                    "an expert outside the active groups must score −∞: here 0 beats the negative scores inside.": (
                        chosen(by_group[:, :, : K // M].sum(2), outside=0.0)
                    ),
                    "a group is judged by its K/M best experts, not by its best one.": chosen(by_group[:, :, 0]),
                    "a group is judged by its K/M best experts, not by all of them.": chosen(by_group.sum(2)),
                    "a group is judged by its K/M best experts, which need not be 2.": (
                        chosen(by_group[:, :, :2].sum(2))
                    ),
                    "a group is judged by its K/M best experts, not by its K best.": chosen(by_group[:, :, :K].sum(2)),
                    "these are the K best of all experts, whatever their groups.": _best(scored, K),
                    "a group is judged by the sum of its K/M best, not by the last of them.": (
                        chosen(by_group[:, :, K // M - 1])
                    ),
                    "a group is judged by its K/M best experts; these are its worst.": (
                        chosen(by_group[:, :, -(K // M) :].sum(2))
                    ),
                    "a group is judged by its K/M best experts, not by its worst one.": chosen(by_group[:, :, -1]),
                    "K/M belongs to the judging of a group; then the K best of all M groups are chosen.": (
                        _best(np.where(_among_best(scored, G, K // M) & inside, scored, -np.inf), K)
                    ),
                    "the experts of a group are neighbours: 0 to E/G − 1 are the first group.": (
                        _strided(scored, G, M, K)
                    ),
                    "these are experts of more than M groups.": (chosen(by_group[:, :, : K // M].sum(2), active=M + 1)),
                    "this takes the worst groups.": chosen(-by_group[:, :, : K // M].sum(2)),
                    "the experts are right, but the best comes first.": np.sort(right, axis=1),
                    "the experts are right, but the best comes first, not last.": right[:, ::-1],
                },
            )
        },
    )


def choices_in_groups(answer: Answer) -> Report:
    """(E, K, G, M) → to how many sets of K experts, from at most M of G groups, a token can be sent."""
    return first_failure(_choices_in_groups(answer, *case) for case in ((16, 4, 4, 2), (15, 3, 5, 3), (8, 2, 2, 1)))


def _choices_in_groups(answer: Answer, E: int, K: int, G: int, M: int) -> Report:
    size = E // G
    right = sum(comb(G, j) * _exactly(j, size, K) for j in range(1, M + 1))
    hints = {
        "a set that lies in fewer than M groups is counted once for each choice of M groups that holds it.": (
            comb(G, M) * comb(M * size, K)
        ),
        "these are sets from exactly M groups, but fewer groups are allowed.": comb(G, M) * _exactly(M, size, K),
        "these are all sets of K experts, as if there were no groups.": comb(E, K),
        "this is for M given groups: which ones is a choice too.": comb(M * size, K),
        "K/M experts from each of M groups is only one way to divide them.": (
            comb(G, M) * comb(size, K // M) ** M if K % M == 0 else right
        ),
        "this adds up sets from 1, 2, … M groups, but a set from few groups is among those from more groups too.": (
            sum(comb(G, j) * comb(j * size, K) for j in range(1, M + 1))
        ),
        "a set of M − 1 groups lies in several choices of M groups, so taking it away once is too little.": (
            comb(G, M) * comb(M * size, K) - (comb(G, M - 1) * comb((M - 1) * size, K) if M > 1 else 0)
        ),
        "these are the sets that touch more than M groups; the others are allowed.": comb(E, K) - right,
        "this is a share of all sets; the number is asked for.": right / comb(E, K),
        "this counts the orders of the K experts too, but a set has none.": right * _factorial(K),
    }
    mistakes = {f"E = {E}, K = {K}, G = {G}, M = {M}: {hint}": wrong for hint, wrong in hints.items() if wrong != right}
    return values(answer, (E, K, G, M), {"choices": right}, mistakes={"choices": mistakes})


def _sum_backward(s: Array, dw: Array, r: float) -> Array:
    """The gradient with respect to s of w = r s/Σs."""
    total = s.sum(1, keepdims=True)
    ds: Array = r / total * (dw - (s * dw).sum(1, keepdims=True) / total)
    return ds


def _softmax_backward(z: Array, dw: Array, r: float) -> Array:
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    dz: Array = r * p * (dw - (p * dw).sum(1, keepdims=True))
    return dz


def _among_best(scored: Array, G: int, count: int) -> Array:
    """True for the ``count`` best experts of each group, (N, E)."""
    of_groups = scored.reshape(len(scored), G, -1)
    least = np.sort(of_groups, axis=2)[:, :, -count, None]
    return (of_groups >= least).reshape(scored.shape)


def _strided(scored: Array, G: int, M: int, K: int) -> Array:
    """The choice if every G-th expert belonged to the same group."""
    N, E = scored.shape
    worth = np.sort(scored.reshape(N, E // G, G), axis=1)[:, -(K // M) :].sum(1)  # (N, G)
    kept = np.zeros((N, G), bool)
    np.put_along_axis(kept, np.argsort(-worth, axis=1)[:, :M], True, axis=1)
    return _best(np.where(np.tile(kept, (1, E // G)), scored, -np.inf), K)


def _exactly(j: int, size: int, K: int) -> int:
    """Sets of K experts that touch each of j given groups: inclusion and exclusion."""
    return sum((-1) ** (j - i) * comb(j, i) * comb(i * size, K) for i in range(j + 1))


def _factorial(K: int) -> int:
    return K * _factorial(K - 1) if K else 1


def _best(scored: Array, K: int) -> Array:
    return np.argsort(-scored, axis=1, kind="stable")[:, :K]


def _without(right: Array, mistakes: dict[str, Array]) -> dict[str, Array]:
    """The mistakes that give another value than the right one in this case."""
    return {hint: wrong for hint, wrong in mistakes.items() if not np.array_equal(wrong, right)}
