"""Wrong answers to the exercises of lesson 13, each with words that its hint must hold."""

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


def sum_of_squares(counts):
    p = counts / counts.sum()
    return (p * p).sum()


def neighbour_from_all(counts):
    N = counts.sum()
    return (counts * (counts - 1)).sum() / N**2


def itself_included(counts):
    N = counts.sum()
    return (counts * counts).sum() / (N * (N - 1))


def in_nats(p):
    return (np.log(p) - np.log(p.mean(0))) / len(p)


def rows_only(p):
    return np.log2(p) / len(p)


def without_the_mean(p):
    return np.log2(p) - np.log2(p.mean(0))


def times_p(p):
    return p * np.log2(p / p.mean(0)) / len(p)


def in_days(parameters, people):
    return parameters / (365.25 * 24 * 3600), parameters / people / (24 * 3600)


def without_leap_years(parameters, people):
    return parameters / (365 * 24 * 3600), parameters / people


def not_in_years(parameters, people):
    return parameters, parameters / people


WRONG = {
    check.either_by_chance: [
        (nothing_in_common, "nothing in common"),
        (shared_on_average, "on average"),
        (with_replacement, "with replacement"),
        (one_expert, "one expert per token"),
    ],
    check.shuffled_exactly: [
        (sum_of_squares, "not its own neighbour"),
        (neighbour_from_all, "N − 1 that are left"),
        (itself_included, "one fewer"),
    ],
    check.jensen_shannon_backward: [
        (in_nats, "in bits"),
        (rows_only, "part of the mixture"),
        (without_the_mean, "1/n is missing"),
        (times_p, "not its derivative"),
    ],
    check.one_a_second: [
        (in_days, "these are days"),
        (without_leap_years, "365.25"),
        (not_in_years, "seconds of a year"),
    ],
}
