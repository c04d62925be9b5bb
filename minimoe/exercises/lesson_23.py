"""Checks of lesson 23: who may look ahead."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure

RATE = 0.05
"""η of the lesson."""


def moved_earlier(answer: Answer) -> Report:
    """(layer, x, new) → whether output t, which is before s, moves when token s is replaced: (T, T), [s, t]."""
    return first_failure(_moved_earlier(answer, layer) for layer in (_two_steps_ahead, _rounds))


def _moved_earlier(answer: Answer, layer: Callable[[Array], Array]) -> Report:
    rng = np.random.default_rng(23)
    T, D = 6, 4
    x, new = rng.standard_normal((2, T, D))

    def moved(changed: Callable[[Array, Array], Array], keep: bool = False, after: bool = False) -> Array:
        found, now = np.zeros((T, T), bool), x.copy()
        for s in range(T):
            now = now.copy() if keep else x.copy()
            now[s] = new[s]
            if after:
                now[s:] = new[s:]
            found[s] = changed(layer(now), layer(x))
        return found

    def differ(one: Array, other: Array) -> Array:
        return abs(one - other).max(1) > 1e-9

    before = np.tri(T, k=-1, dtype=bool)
    right = moved(differ) & before
    mistakes = {
        "this counts the tokens from s on too; only the outputs before s must not move.": moved(differ),
        "output s itself may move when token s does; count the outputs before it.": moved(differ)
        & np.tri(T, dtype=bool),
        "rows are the replaced token s, columns the output t: this is the transpose.": right.T,
        "these are the outputs after s, which may move: what comes later has seen token s.": moved(differ)
        & ~before
        & ~np.eye(T, dtype=bool),
        "an earlier replacement is still there: start from the old x for each s.": moved(differ, keep=True) & before,
        "the tokens after s are replaced too: replace token s alone.": moved(differ, after=True) & before,
        "there is a leak that this does not find. It is in some numbers of an output only, and their changes add up to "
        "0: compare number by number.": moved(lambda one, other: abs((one - other).sum(1)) > 1e-9) & before,
    }
    if layer is _rounds:  # the other mistakes were found with the first layer
        hint = "a difference of 1e-16 is rounding, not a leak: compare with a tolerance such as 1e-9."
        mistakes = {hint: moved(lambda one, other: (one != other).any(1)) & before}
    return values(
        answer,
        (layer, x, new),
        {"moved": right.astype(int)},
        sizes={"T": T},
        mistakes={"moved": _without(right, mistakes)},
    )


def _two_steps_ahead(x: Array) -> Array:
    """A causal mean, and a leak into two of the channels: what token t + 2 sends to t adds up to 0 over them."""
    y: Array = np.cumsum(x, axis=0) / np.arange(1, len(x) + 1)[:, None]
    y[:-2, 1] += x[2:, 0]
    y[:-2, 2] -= x[2:, 0]
    return y


def _rounds(x: Array) -> Array:
    """A causal layer that adds a mean over time and subtracts it again."""
    mean = 1e3 * x.mean(0)
    y: Array = (np.cumsum(x, axis=0) + mean) - mean
    return y


def choose_tokens(answer: Answer) -> Report:
    """(p, real, K) → taken (B, T, E): each expert's ⌈K T_b / E⌉ best real tokens of each sequence."""
    rng = np.random.default_rng(23)
    B, T, E, K = 3, 8, 5, 2
    p = _softmax(2 * rng.standard_normal((B, T, E)), 2)
    real = np.ones((B, T), bool)
    real[1, 5:] = real[2, 2:] = False  # K T_b / E is whole for one of the sequences: 2 · 5 / 5
    p[0] *= 0.8 / (p[0].sum(1, keepdims=True) - p[0, :, 2:3])
    p[0, :, 2] = 0.2  # a tie of eight for four places
    lengths = real.sum(1)
    quota = [math.ceil(K * length / E) for length in lengths]
    ranked = np.where(real[:, :, None], p, -1)
    right = _best(ranked, quota)
    per_token = np.zeros_like(right)
    np.put_along_axis(per_token, np.argsort(-p, axis=2, kind="stable")[:, :, :K], True, axis=2)
    latest = _best(ranked[:, ::-1], quota)[:, ::-1]
    mistakes = {
        "here each token takes K experts; let each expert take tokens: rank along T.": per_token,
        "here each token takes K experts, and padding none; let each expert take tokens: rank along T.": (
            per_token & real[:, :, None]
        ),
        "padding is among the tokens taken: rank it below every real token.": _best(p, quota),
        "the quota counts padding: T_b is the number of real tokens of sequence b.": (
            _best(ranked, [math.ceil(K * T / E)] * B) & real[:, :, None]
        ),
        "the quota counts padding, and padding is taken: T_b is the number of real tokens of sequence b.": (
            _best(p, [math.ceil(K * T / E)] * B)
        ),
        "the quota is rounded down; ⌈ ⌉ rounds up.": _best(ranked, [K * int(length) // E for length in lengths]),
        "⌈ ⌉ leaves a whole number as it is; this adds 1 to it.": _best(
            ranked, [K * int(length) // E + 1 for length in lengths]
        ),
        "the quota is rounded to the nearest number; ⌈ ⌉ rounds up.": _best(
            ranked, [round(K * int(length) / E) for length in lengths]
        ),
        "of equal tokens, all are taken here; an expert takes exactly ⌈K T_b / E⌉, and of equal ones the earlier.": (
            _at_least(ranked, quota) & real[:, :, None]
        ),
        "the K is missing from the quota.": _best(ranked, [math.ceil(length / E) for length in lengths]),
        "the experts choose from all sequences together; each sequence has its own places.": (
            _best(ranked.reshape(1, B * T, E), [sum(quota)]).reshape(B, T, E)
        ),
        "these are the worst tokens: sort −p, or take from the end.": _best(np.where(real[:, :, None], -p, -2), quota),
        "of two equal tokens the later one is taken here; the earlier one should win.": latest,
    }
    return values(
        answer,
        (p, real, K),
        {"taken": right.astype(int)},
        sizes={"B": B, "T": T, "E": E},
        mistakes={"taken": _without(right, mistakes)},
    )


def renormalized_backward(answer: Answer) -> Report:
    """(p, taken, dw) → dz, for w = p / Σ p over the experts that took the token."""
    rng = np.random.default_rng(23)
    T, E = 7, 5
    z = rng.standard_normal((T, E))
    taken = rng.random((T, E)) < 0.5
    taken[0], taken[1], taken[2] = False, np.arange(E) == 3, True  # no expert, one, all
    dw = rng.standard_normal((T, E))

    def weights(z: Array) -> Array:
        kept = np.exp(z) * taken
        return kept / np.maximum(kept.sum(1, keepdims=True), 1e-300)

    p, w = _softmax(z, 1), weights(z)
    total = (w * dw).sum(1, keepdims=True)
    raw, whole = taken * dw, np.where(taken.any(1, keepdims=True), (p * taken).sum(1, keepdims=True), 1)
    return gradients(
        answer,
        (p, taken, dw),
        lambda z: (dw * weights(z)).sum(),
        {"z": z},
        sizes={"T": T, "E": E},
        mistakes={
            "dz": {
                "the sum that p is divided by depends on z too: it passes on a gradient of its own.": (
                    p * (raw / whole - (p * raw / whole).sum(1, keepdims=True))
                ),
                "this is the gradient for raw weights w = p; here they are divided by their sum.": (
                    p * (raw - (p * raw).sum(1, keepdims=True))
                ),
                "the mean term is missing: when one weight of a token rises, its others fall.": w * dw,
                "this uses p; the weights add up to 1 only after the division.": taken * p * (dw - total),
                "experts that did not take the token get a gradient here, but their logits do not enter w.": (
                    p * (raw - total)
                ),
                "the mean of dw must be weighted with w.": (
                    w * (dw - raw.sum(1, keepdims=True) / np.maximum(taken.sum(1, keepdims=True), 1))
                ),
                "the mean of a softmax is over the experts of a token; here it is over tokens.": (
                    w * (dw - (w * dw).sum(0))
                ),
                "this goes the wrong way.": -w * (dw - total),
                "the softmax is left: this is the gradient with respect to w.": raw,
            }
        },
    )


def next_threshold(answer: Answer) -> Report:
    """(tau, load, N, K) → τ · exp(η (load / fair − 1)), with fair = K N / E."""
    rng = np.random.default_rng(23)
    E, N, K = 6, 53, 3  # the fair share is 26.5
    tau, load = rng.uniform(0.05, 0.4, E), np.array([25, 40, 0, 31, 7, 50])
    fair = K * N / E
    surplus = load / fair - 1
    return values(
        answer,
        (tau, load, N, K),
        {"tau": tau * np.exp(RATE * surplus)},
        sizes={"E": E},
        mistakes={
            "tau": {
                "this goes the wrong way: an expert that took too many must become harder to enter.": (
                    tau * np.exp(-RATE * surplus)
                ),
                "the fair share of N tokens that have K experts each is K N / E, not N / E.": (
                    tau * np.exp(RATE * (load * E / N - 1))
                ),
                "divide the load by the fair share; this is their difference.": tau * np.exp(RATE * (load - fair)),
                "the fair share is fixed by N and K; this is the mean load.": (
                    tau * np.exp(RATE * (load / load.mean() - 1))
                ),
                "the threshold is multiplied by the factor, so that it stays positive; this adds.": tau
                + RATE * surplus,
                "only the direction of the surplus is used here; its size counts too.": (
                    tau * np.exp(RATE * np.sign(surplus))
                ),
                "the fair share need not be a whole number; here it is rounded.": (
                    tau * np.exp(RATE * (load / (K * N // E) - 1))
                ),
                "the rate η = 0.05 is missing.": tau * np.exp(surplus),
                "this is the load as a share of all N tokens; divide it by the fair share K N / E.": (
                    tau * np.exp(RATE * (load / N - 1))
                ),
                "the − 1 is missing: at the fair share, nothing moves.": tau * np.exp(RATE * load / fair),
                "this is the factor alone; the old τ is missing.": np.exp(RATE * surplus),
                "this is 1 + η (load / fair − 1), which is near the exponential but can become negative: use exp.": (
                    tau * (1 + RATE * surplus)
                ),
            }
        },
    )


def two_softmaxes(answer: Answer) -> Report:
    """L (B, T, S) → D, what each slot reads of its own sequence, and C, what each token takes."""
    rng = np.random.default_rng(23)
    B, T, S = 3, 5, 4
    logits = rng.standard_normal((B, T, S))
    over = [_softmax(logits, axis) for axis in range(3)]
    all_tokens = _softmax(logits.reshape(B * T, S), 0).reshape(B, T, S)
    return values(
        answer,
        (logits,),
        {"D": over[1], "C": over[2]},
        sizes={"B": B, "T": T, "S": S},
        shares=("D", "C"),
        mistakes={
            "D": {
                "this softmax is over the sequences of the batch: strangers share their tokens.": over[0],
                "this softmax is over the tokens of all sequences: strangers share their tokens.": all_tokens,
                "this softmax is over the slots; a slot divides its attention among tokens.": over[2],
            },
            "C": {
                "this softmax is over the sequences of the batch.": over[0],
                "this softmax is over the tokens; a token divides its attention among slots.": over[1],
                "this softmax is over tokens and slots together.": _softmax(logits.reshape(B, T * S), 1).reshape(
                    B, T, S
                ),
            },
        },
    )


def _best(p: Array, quota: list[int]) -> Array:
    """p (B, T, E) → the ``quota[b]`` largest of each column of each sequence, (B, T, E) bool."""
    taken = np.zeros(p.shape, bool)
    for b, c in enumerate(quota):
        np.put_along_axis(taken[b], np.argsort(-p[b], axis=0, kind="stable")[:c], True, axis=0)
    return taken


def _at_least(p: Array, quota: list[int]) -> Array:
    """p (B, T, E) → all that are not below the ``quota[b]``-th largest of their column: more than that if some tie."""
    last = [np.sort(p[b], axis=0)[::-1][c - 1] for b, c in enumerate(quota)]  # (E,) each
    return p >= np.array(last)[:, None]


def _without(right: Array, mistakes: dict[str, Array]) -> dict[str, Array]:
    """The mistakes that give another value than the right one in this case, as the 0 and 1 that checks compare."""
    return {hint: wrong.astype(int) for hint, wrong in mistakes.items() if not np.array_equal(wrong, right)}


def _softmax(z: Array, axis: int) -> Array:
    p: Array = np.exp(z - z.max(axis, keepdims=True))
    p /= p.sum(axis, keepdims=True)
    return p
