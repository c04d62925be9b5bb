"""Checks of lesson 14: dense or sparse."""

from __future__ import annotations

import math

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure


def experts_touched(answer: Answer) -> Report:
    """(experts, active, batch) → the average number of different experts, for small and large batches."""
    return first_failure(_touched(answer, *case) for case in ((8, 2, 5), (64, 6, 3), (8, 2, 1)))


def _touched(answer: Answer, E: int, K: int, B: int) -> Report:
    return values(
        answer,
        (E, K, B),
        {"touched": np.array(E * (1 - (1 - K / E) ** B))},
        mistakes={
            "touched": {
                "this counts visits, but two tokens may visit the same expert.": np.array(float(K * B)),
                "this counts visits and stops at E, but two tokens may visit the same expert long before that.": (
                    np.array(float(min(K * B, E)))
                ),
                "this is how many experts are missed.": np.array(E * (1 - K / E) ** B),
                "this is the probability for one expert, but there are E experts.": np.array(1 - (1 - K / E) ** B),
                "the K visits of one token never meet: it goes to K different experts.": np.array(
                    E * (1 - (1 - 1 / E) ** (K * B))
                ),
            }
        },
    )


def paired_difference(answer: Answer) -> Report:
    """(a, b) → the mean of a − b over seeds and its standard error."""
    rng = np.random.default_rng(14)
    n = 5
    luck = rng.standard_normal(n)
    a, b = luck + 0.1 * rng.standard_normal((2, n)) + np.array([[0.2], [0.0]])
    difference = a - b
    spread = difference.std(ddof=1)
    return values(
        answer,
        (a, b),
        {"mean": np.array(difference.mean()), "error": np.array(spread / math.sqrt(n))},
        sizes={"n": n},
        mistakes={
            "mean": {"this is b − a.": np.array(-difference.mean())},
            "error": {
                "this is the spread of one difference, but the mean of n is √n times more certain.": np.array(spread),
                "this divides by n instead of n − 1: the mean was computed from the same values (ddof=1).": np.array(
                    difference.std() / math.sqrt(n)
                ),
                "this divides by n instead of n − 1 (ddof=1), and √n is missing.": np.array(difference.std()),
                "this treats a and b as independent, but they share their luck: look at the differences.": np.array(
                    math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / n)
                ),
                "the spread is divided by n, but the error of a mean shrinks with √n.": np.array(spread / n),
            },
        },
    )


def tokens_per_second(answer: Answer) -> Report:
    """(shared, experts_total, E, K, batch, bytes_each, bandwidth, peak) → tokens per second, limited by memory or
    arithmetic."""
    model = (1.6e9, 45.1e9, 8, 2)
    cases = (
        (*model, 4, 2, 2e12, 3e14),
        (*model, 1, 1, 1e12, 1e14),
        (0.9e9, 20.1e9, 48, 5, 7, 2, 3e12, 2e14),
        (*model, 3000, 2, 2e12, 3e14),
    )
    return first_failure(_tokens_per_second(answer, *case) for case in cases)


def _tokens_per_second(
    answer: Answer,
    shared: float,
    experts_total: float,
    E: int,
    K: int,
    batch: int,
    bytes_each: int,
    bandwidth: float,
    peak: float,
) -> Report:
    touched = 1 - (1 - K / E) ** batch
    active = shared + experts_total * K / E
    reading = bytes_each * (shared + experts_total * touched) / bandwidth
    arithmetic = 2 * active * batch / peak

    def speed(reading: float, arithmetic: float) -> Array:
        return np.array(batch / max(reading, arithmetic))

    return values(
        answer,
        (shared, experts_total, E, K, batch, bytes_each, bandwidth, peak),
        {"speed": speed(reading, arithmetic)},
        mistakes={
            "speed": {
                "this is the time of a step: how many tokens does a step make?": np.array(max(reading, arithmetic)),
                "this is the number of steps per second, but each step makes a token for every conversation.": np.array(
                    1 / max(reading, arithmetic)
                ),
                "reading and arithmetic overlap: the longer one counts, not their sum.": np.array(
                    batch / (reading + arithmetic)
                ),
                "this reads every expert at every step, but a small batch does not touch them all.": speed(
                    bytes_each * (shared + experts_total) / bandwidth, arithmetic
                ),
                "this reads K experts whatever the batch, but different tokens touch different experts.": speed(
                    bytes_each * active / bandwidth, arithmetic
                ),
                "this leaves out the arithmetic, or counts it for one token: it grows with the batch, and limits the "
                "speed of a large one.": np.array(batch / reading),
                "a parameter takes two operations per token: a product and a sum.": speed(reading, arithmetic / 2),
                "a token uses K of the E experts, however many of them the batch touches.": speed(
                    reading, 2 * (shared + experts_total * touched) * batch / peak
                ),
            }
        },
    )


def touched_backward(answer: Answer) -> Report:
    """(q, batch) → the gradient of the number of touched experts with respect to their popularity."""
    rng = np.random.default_rng(14)
    E, batch = 6, 4
    q = rng.uniform(0.1, 0.6, E)
    missed = 1 - q
    return gradients(
        answer,
        (q, batch),
        lambda q: (1 - (1 - q) ** batch).sum(),
        {"q": q},
        sizes={"E": E},
        mistakes={
            "dq": {
                "two minus signs cancel: is a more popular expert touched less often?": -batch * missed ** (batch - 1),
                "the derivative lowers the power by one.": batch * missed**batch,
                "the power must also become a factor.": missed ** (batch - 1),
                "this is the number of touched experts, not its gradient.": 1 - missed**batch,
                "the base of the power is 1 − q, not q.": batch * q ** (batch - 1),
            }
        },
    )
