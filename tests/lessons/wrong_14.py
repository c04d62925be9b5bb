"""Wrong answers to the exercises of lesson 14, each with words that its hint must hold."""

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


def spread_of_one(a, b):
    return (a - b).mean(), (a - b).std(ddof=1)


def population_spread(a, b):
    return (a - b).mean(), (a - b).std() / np.sqrt(len(a))


def as_strangers(a, b):
    return a.mean() - b.mean(), np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / len(a))


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


def wrong_sign(q, batch):
    return -batch * (1 - q) ** (batch - 1)


def power_kept(q, batch):
    return batch * (1 - q) ** batch


def factor_forgotten(q, batch):
    return (1 - q) ** (batch - 1)


WRONG = {
    check.experts_touched: [
        (visits, "counts visits"),
        (visits_up_to_all, "stops at E"),
        (missed, "missed"),
        (visits_may_meet, "never meet"),
    ],
    check.paired_difference: [
        (spread_of_one, "√n times more certain"),
        (population_spread, "ddof=1"),
        (as_strangers, "a and b as independent"),
    ],
    check.tokens_per_second: [
        (steps_per_second, "steps per second"),
        (one_after_the_other, "not their sum"),
        (reads_every_expert, "does not touch them all"),
        (reads_k_experts, "whatever the batch"),
        (no_arithmetic, "leaves out the arithmetic"),
    ],
    check.touched_backward: [
        (wrong_sign, "two minus signs"),
        (power_kept, "power by one"),
        (factor_forgotten, "become a factor"),
    ],
}
