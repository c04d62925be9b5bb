"""Checks of lesson 13: what experts learn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, permutations

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure

YEAR = 365.25 * 24 * 3600
"""In seconds."""


def either_by_chance(answer: Answer) -> Report:
    """(E, K) → the chance that two random sets of K out of E experts share one; all pairs of sets are tried."""

    def case(experts: int, top_k: int) -> Report:
        sets = [set(chosen) for chosen in combinations(range(experts), top_k)]
        chance = float(np.mean([bool(one & other) for one in sets for other in sets]))
        return values(
            answer,
            (experts, top_k),
            {"chance": chance},
            sizes={"E": experts, "K": top_k},
            shares=("chance",),
            mistakes={
                "chance": {
                    "this is the chance that the sets have nothing in common.": 1 - chance,
                    "this is how many experts they share on average, but two shared experts count only once.": (
                        top_k * top_k / experts
                    ),
                    "this draws with replacement, but the K experts of one token are different: after one miss, fewer "
                    "experts are left to miss.": 1 - (1 - top_k / experts) ** top_k,
                    "this is the chance that a set has one given expert, but any of K experts will do.": top_k
                    / experts,
                    "this is the chance for one expert per token.": 1 / experts,
                }
            },
        )

    return first_failure(case(*sizes) for sizes in ((8, 2), (7, 3), (5, 3)))


def shuffled_exactly(answer: Answer) -> Report:
    """counts → the expected share of equal neighbours in random order; every order is tried."""

    def case(counts: Sequence[int]) -> Report:
        choices = np.repeat(np.arange(len(counts)), counts)
        orders = np.array(list(permutations(choices)))
        expected = float((orders[:, 1:] == orders[:, :-1]).mean())
        total = len(choices)
        p = np.array(counts) / total
        return values(
            answer,
            (np.array(counts),),
            {"share": expected},
            sizes={"N": total, "E": len(counts)},
            shares=("share",),
            mistakes={
                "share": {
                    "this is Σp², which draws the neighbour from all tokens, but a token is not its own neighbour.": (
                        np.square(p).sum()
                    ),
                    "the first token is drawn from all N, but its neighbour from the N − 1 that are left.": (
                        p * (np.array(counts) - 1) / total
                    ).sum(),
                    "the neighbour must be one of the other tokens of the same expert, of which there is one fewer.": (
                        p * np.array(counts) / (total - 1)
                    ).sum(),
                    "this is uniform chance, 1/E, but the loads are not even.": 1 / len(counts),
                    "this is the number of pairs that agree; divide it by the N − 1 pairs.": expected * (total - 1),
                }
            },
        )

    return first_failure(case(counts) for counts in ((3, 2, 1), (4, 1, 0, 2)))


def jensen_shannon_backward(answer: Answer) -> Report:
    """p (n, E) → the gradient of the Jensen-Shannon divergence of its rows, in bits."""
    rng = np.random.default_rng(13)
    n, experts = 3, 5
    p = rng.uniform(0.2, 1, (n, experts))
    p /= p.sum(1, keepdims=True)
    mixture = p.mean(0)

    def loss(p: Array) -> float:
        def bits(p: Array) -> Array:
            result: Array = -(p * np.log2(p)).sum(-1)
            return result

        return float(bits(p.mean(0)) - bits(p).mean())

    right = np.log2(p / mixture) / n
    return gradients(
        answer,
        (p,),
        loss,
        {"p": p},
        sizes={"n": n, "E": experts},
        mistakes={
            "dp": {
                "this is in nats, but the divergence is in bits.": right * np.log(2),
                "1/n is missing: both terms are means over n rows.": n * right,
                "this is the term of the rows' own entropies only, but each row is also a part of the mixture.": (
                    np.log2(p) / n
                ),
                "this is the term of the rows' own entropies only, with its constant.": (
                    (np.log2(p) + 1 / np.log(2)) / n
                ),
                "this is the term of the mixture only.": np.broadcast_to(-np.log2(mixture) / n, p.shape),
                "this is the term of the mixture only, with its constant.": np.broadcast_to(
                    -(np.log2(mixture) + 1 / np.log(2)) / n, p.shape
                ),
                "each entry is multiplied by p: this is a row's divergence, not its derivative.": p * right,
            }
        },
    )


def one_a_second(answer: Answer) -> Report:
    """(parameters, people) → years for one, seconds for all."""

    def case(parameters: float, people: float) -> Report:
        years, seconds = parameters / YEAR, parameters / people
        return values(
            answer,
            (parameters, people),
            {"years": years, "seconds": seconds},
            mistakes={
                "years": {
                    "these are seconds: divide by the seconds of a year.": parameters,
                    "these are days.": parameters / (24 * 3600),
                    "these are hours.": parameters / 3600,
                    "these are the years of all people together, but one person does all of the work.": years / people,
                    "a year has 365.25 days here.": parameters / (365 * 24 * 3600),
                },
                "seconds": {
                    "these are days, but the question is about seconds.": seconds / (24 * 3600),
                    "these are minutes, but the question is about seconds.": seconds / 60,
                    "these are years, but the question is about seconds.": seconds / YEAR,
                    "people who share the work need less time: divide, do not multiply.": parameters * people,
                },
            },
        )

    return first_failure(case(*numbers) for numbers in ((1.8e12, 8e9), (46_702_792_704, 1000)))
