"""Wrong answers to the exercises of lesson 13, each with words that its hint must hold, and unusual right ones."""

import itertools
import math

import numpy as np

from minimoe.exercises import lesson_13 as check


def nothing_in_common(E, K):
    return math.comb(E - K, K) / math.comb(E, K)


def shared_on_average(E, K):
    return K * K / E


def with_replacement(E, K):
    return 1 - ((E - K) / E) ** K


def one_expert(E, K):
    return 1 / E


def in_per_cent(E, K):
    return 100 * one_by_binomials(E, K)


def one_by_binomials(E, K):
    return 1 - math.comb(E - K, K) / math.comb(E, K)


def every_number_in_common(E, K):
    return sum(math.comb(K, n) * math.comb(E - K, K - n) for n in range(1, K + 1)) / math.comb(E, K)


def every_second_set(E, K):
    sets = list(itertools.combinations(range(E), K))
    return sum(not set(range(K)).isdisjoint(other) for other in sets) / len(sets)


def sum_of_squares(counts):
    p = counts / counts.sum()
    return (p * p).sum()


def neighbour_from_all(counts):
    N = counts.sum()
    return (counts * (counts - 1)).sum() / N**2


def itself_included(counts):
    N = counts.sum()
    return (counts * counts).sum() / (N * (N - 1))


def pairs_that_agree(counts):
    N = counts.sum()
    return (counts * (counts - 1)).sum() / N


def uniform(counts):
    return 1 / len(counts)


def pairs_of_all_pairs(counts):
    return sum(math.comb(count, 2) for count in counts) / math.comb(sum(counts), 2)


def one_minus_the_different(counts):
    different = counts[:, None] * counts
    return 1 - (different.sum() - np.trace(different)) / (counts.sum() * (counts.sum() - 1))


def in_nats(p):
    return (np.log(p) - np.log(p.mean(0))) / len(p)


def rows_only(p):
    return np.log2(p) / len(p)


def without_the_mean(p):
    return np.log2(p) - np.log2(p.mean(0))


def times_p(p):
    return p * np.log2(p / p.mean(0)) / len(p)


def against_the_divergence(p):
    return (np.log2(p.mean(0)) - np.log2(p)) / len(p)


def mixture_only(p):
    return np.broadcast_to(-(np.log2(p.mean(0)) + 1 / np.log(2)) / len(p), p.shape)


def both_constants(p):
    constant = 1 / math.log(2)
    return (np.log2(p) + constant - np.log2(p.mean(0)) - constant) / len(p)


def row_by_row(p):
    n = len(p)
    return [
        [math.log(n * value / total) / math.log(2) / n for value, total in zip(row, sum(p), strict=True)] for row in p
    ]


def multiplied(parameters, people):
    return parameters / 31_557_600, parameters * people


def shared_years(parameters, people):
    return parameters / 31_557_600 / people, parameters / people


def by_days(parameters, people):
    return parameters / 60 / 60 / 24 / 365.25, parameters / people


def from_the_years(parameters, people):
    years = parameters / (1461 * 6 * 3600)
    return np.array([years, years * 31_557_600 / people])


def in_days(parameters, people):
    return parameters / (365.25 * 24 * 3600), parameters / people / (24 * 3600)


def without_leap_years(parameters, people):
    return parameters / (365 * 24 * 3600), parameters / people


def not_in_years(parameters, people):
    return parameters, parameters / people


RIGHT = {
    check.either_by_chance: [one_by_binomials, every_number_in_common, every_second_set],
    check.shuffled_exactly: [pairs_of_all_pairs, one_minus_the_different],
    check.jensen_shannon_backward: [both_constants, row_by_row],
    check.one_a_second: [by_days, from_the_years],
}
WRONG = {
    check.either_by_chance: [
        (nothing_in_common, "nothing in common"),
        (shared_on_average, "on average"),
        (with_replacement, "with replacement"),
        (one_expert, "one expert per token"),
        (in_per_cent, "per cent"),
    ],
    check.shuffled_exactly: [
        (sum_of_squares, "not its own neighbour"),
        (neighbour_from_all, "N − 1 that are left"),
        (itself_included, "one fewer"),
        (pairs_that_agree, "number of pairs"),
        (uniform, "uniform chance"),
    ],
    check.jensen_shannon_backward: [
        (in_nats, "in bits"),
        (rows_only, "part of the mixture"),
        (without_the_mean, "1/n is missing"),
        (times_p, "not its derivative"),
        (against_the_divergence, "wrong sign"),
        (mixture_only, "term of the mixture only"),
    ],
    check.one_a_second: [
        (in_days, "these are days"),
        (without_leap_years, "365.25"),
        (not_in_years, "seconds of a year"),
        (multiplied, "divide, do not multiply"),
        (shared_years, "all people together"),
    ],
}
