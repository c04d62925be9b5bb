"""Wrong answers to the exercises of lesson 14, each with words that its hint must hold, and unusual right ones."""

import math

import numpy as np

from minimoe.exercises import lesson_14 as check


def visits(experts, active, batch):
    return float(active * batch)


def visits_up_to_all(experts, active, batch):
    return float(min(experts, active * batch))


def missed(experts, active, batch):
    return experts * (1 - active / experts) ** batch


def visits_may_meet(experts, active, batch):
    return experts * (1 - (1 - 1 / experts) ** (active * batch))


def for_one_expert(experts, active, batch):
    return 1 - (1 - active / experts) ** batch


def token_by_token(experts, active, batch):
    touched = 0.0
    for _ in range(batch):
        touched += (experts - touched) * active / experts  # the new ones among the next token's
    return touched


def by_logarithm(experts, active, batch):
    return -experts * np.expm1(batch * np.log1p(-active / experts))


def spread_of_one(a, b):
    return (a - b).mean(), (a - b).std(ddof=1)


def population_spread(a, b):
    return (a - b).mean(), (a - b).std() / np.sqrt(len(a))


def as_strangers(a, b):
    return a.mean() - b.mean(), np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / len(a))


def b_minus_a(a, b):
    return (b - a).mean(), (b - a).std(ddof=1) / np.sqrt(len(a))


def divided_by_n(a, b):
    return (a - b).mean(), (a - b).std(ddof=1) / len(a)


def root_of_n_minus_1(a, b):
    return a.mean() - b.mean(), np.std(a - b) / np.sqrt(len(a) - 1)


def by_sums(a, b):
    n, d = len(a), [x - y for x, y in zip(a, b, strict=True)]
    mean = math.fsum(d) / n
    return [mean, math.sqrt(sum((x - mean) ** 2 for x in d) / (n * (n - 1)))]


def times(shared, experts_total, E, K, batch, bytes_each, bandwidth, peak):
    read = shared + experts_total * (1 - (1 - K / E) ** batch)
    active = shared + experts_total * K / E
    return bytes_each * read / bandwidth, 2 * active * batch / peak


def steps_per_second(*arguments):
    return 1 / max(times(*arguments))


def one_after_the_other(*arguments):
    return arguments[4] / sum(times(*arguments))


def reads_every_expert(shared, experts_total, E, K, batch, bytes_each, bandwidth, peak):
    arithmetic = 2 * (shared + experts_total * K / E) * batch / peak
    return batch / max(bytes_each * (shared + experts_total) / bandwidth, arithmetic)


def reads_k_experts(shared, experts_total, E, K, batch, bytes_each, bandwidth, peak):
    active = shared + experts_total * K / E
    return batch / max(bytes_each * active / bandwidth, 2 * active * batch / peak)


def no_arithmetic(*arguments):
    return arguments[4] / times(*arguments)[0]


def arithmetic_of_one_token(*arguments):
    reading, arithmetic = times(*arguments)
    return arguments[4] / max(reading, arithmetic / arguments[4])


def touched_by_one_token(shared, experts_total, E, K, batch, bytes_each, bandwidth, peak):
    read = shared + experts_total * (1 - (1 - K / E) ** batch)
    return batch / max(bytes_each * read / bandwidth, 2 * read * batch / peak)


def time_of_a_step(*arguments):
    return max(times(*arguments))


def smaller_speed(*arguments):
    reading, arithmetic = times(*arguments)
    return min(arguments[4] / reading, arguments[4] / arithmetic)


def per_token(shared, experts_total, E, K, batch, bytes_each, bandwidth, peak):
    missed = (1 - K / E) ** batch
    reading = bytes_each * (shared + experts_total - experts_total * missed) / bandwidth / batch
    return 1 / np.maximum(reading, (shared + K * (experts_total / E)) / (peak / 2))


def wrong_sign(q, batch):
    return -batch * (1 - q) ** (batch - 1)


def power_kept(q, batch):
    return batch * (1 - q) ** batch


def factor_forgotten(q, batch):
    return (1 - q) ** (batch - 1)


def number_touched(q, batch):
    return 1 - (1 - q) ** batch


def power_of_q(q, batch):
    return batch * q ** (batch - 1)


def one_token_less(q, batch):
    return batch * np.prod([1 - q] * (batch - 1), axis=0)


def over_the_missed(q, batch):
    return [batch * (1 - p) ** batch / (1 - p) for p in q]


RIGHT = {
    check.experts_touched: [token_by_token, by_logarithm],
    check.paired_difference: [root_of_n_minus_1, by_sums],
    check.tokens_per_second: [smaller_speed, per_token],
    check.touched_backward: [one_token_less, over_the_missed],
}
WRONG = {
    check.experts_touched: [
        (visits, "counts visits"),
        (visits_up_to_all, "stops at E"),
        (missed, "missed"),
        (visits_may_meet, "never meet"),
        (for_one_expert, "there are E experts"),
    ],
    check.paired_difference: [
        (spread_of_one, "√n times more certain"),
        (population_spread, "ddof=1"),
        (as_strangers, "a and b as independent"),
        (b_minus_a, "this is b − a"),
        (divided_by_n, "shrinks with √n"),
    ],
    check.tokens_per_second: [
        (steps_per_second, "steps per second"),
        (one_after_the_other, "not their sum"),
        (reads_every_expert, "does not touch them all"),
        (reads_k_experts, "whatever the batch"),
        (no_arithmetic, "leaves out the arithmetic"),
        (arithmetic_of_one_token, "counts it for one token"),
        (touched_by_one_token, "however many of them"),
        (time_of_a_step, "time of a step"),
    ],
    check.touched_backward: [
        (wrong_sign, "two minus signs"),
        (power_kept, "power by one"),
        (factor_forgotten, "become a factor"),
        (number_touched, "not its gradient"),
        (power_of_q, "is 1 − q"),
    ],
}
