"""Wrong answers to the exercises of lesson 53, each with words that its hint must hold, and unusual right ones."""

from collections import OrderedDict
from fractions import Fraction

import numpy as np

from minimoe.exercises import lesson_53 as check


def cached(drop=0, move=True, room=0, answer=lambda hits, uses: hits):
    """The right cache but for one thing."""

    def lru_hits(experts, slots):
        held, hits = [], 0
        for expert in experts.tolist():
            if expert in held:
                hits += 1
                if move:
                    held.remove(expert)
                    held.append(expert)
                continue
            if len(held) >= slots + room:
                held.pop(drop)
            held.append(expert)
        return answer(hits, len(experts))

    return lru_hits


def by_distance(experts, slots):
    """A use is a hit if fewer than ``slots`` different experts came since the last one."""
    hits = 0
    for i, expert in enumerate(experts):
        before = np.flatnonzero(experts[:i] == expert)
        hits += before.size > 0 and len(set(experts[before[-1] + 1 : i])) < slots
    return hits


def with_an_ordered_dictionary(experts, slots):
    held, hits = OrderedDict(), 0
    for expert in map(int, experts):
        hits += expert in held
        held[expert] = None
        held.move_to_end(expert)
        if len(held) > slots:
            held.popitem(last=False)
    return np.int64(hits)


def next_use(future, expert):
    found = np.flatnonzero(future == expert)
    return found[0] if found.size else np.inf


def drops(rank, of=max):
    return lambda held, future: of(held, key=lambda expert: rank(future, expert))


def never_stays(future, expert):
    """An expert that is never used again is taken for one that is used at once."""
    found = np.flatnonzero(future == expert)
    return found[0] if found.size else -1


def last_use(future, expert):
    found = np.flatnonzero(future == expert)
    return found[-1] if found.size else np.inf


def crossed_out(held, future):
    """Cross out what is used, in order, until one is left."""
    left = list(held)
    for expert in future:
        if expert in left and len(left) > 1:
            left.remove(expert)
    return left[0]


def sorted_by_next_use(held, future):
    return np.array(held)[np.argsort([next_use(future, expert) for expert in held])[-1]]


def seconds(bits=8, missed=lambda h: 1 - h, join=lambda reading, compute: reading + compute):
    def seconds_per_token(weights, bits_each, hit_rate, bandwidth, compute):
        return join(weights * bits_each / bits * missed(hit_rate) / bandwidth, compute)

    return seconds_per_token


def read(of=lambda groups: sum(len(np.unique(group)) for group in groups), over=lambda experts, groups: len(experts)):
    def bytes_of_a_batch(experts, batch, size):
        groups = experts.reshape(-1, batch * experts.shape[1])
        return of(groups) * size / over(experts, groups)

    return bytes_of_a_batch


def with_sets(experts, batch, size):
    rows = experts.tolist()
    total = 0
    for start in range(0, len(rows), batch):
        total += len({expert for row in rows[start : start + batch] for expert in row})
    return Fraction(total * size, len(rows))


def with_a_table(experts, batch, size):
    used = np.zeros((len(experts) // batch, experts.max() + 1), bool)
    used[np.arange(len(experts)).repeat(experts.shape[1]) // batch, experts.ravel()] = True
    return used.sum() / len(experts) * size


WRONG = {
    check.lru_hits: [
        (cached(move=False), "move it to the end"),
        (cached(drop=-1), "drops the expert that was used last"),
        (cached(room=1), "one expert more than there are slots"),
        (cached(room=-1), "one expert fewer than there are slots"),
        (cached(answer=lambda hits, uses: uses - hits), "these are the misses"),
        (cached(answer=lambda hits, uses: hits / uses), "their number was asked for"),
    ],
    check.oracle_drops: [
        (drops(next_use, min), "so it should stay"),
        (lambda held, future: held.index(drops(next_use)(held, future)), "the expert at that place"),
        (drops(last_use), "not at its last one"),
        (drops(lambda future, expert: (future == expert).sum(), min), "not at how often"),
        (drops(never_stays), "should leave first"),
        (lambda held, future: held[0], "the first of the list"),
        (lambda held, future: held[-1], "the last of the list"),
    ],
    check.seconds_per_token: [
        (seconds(bits=1), "eight bits are one byte"),
        (seconds(missed=lambda h: h), "the misses are"),
        (seconds(missed=lambda h: 1), "without a cache"),
        (seconds(join=lambda reading, compute: reading), "the products come on top"),
        (
            lambda weights, bits, hit_rate, bandwidth, compute: (
                (1 - hit_rate) * (weights * bits / 8 / bandwidth + compute)
            ),
            "but they are computed",
        ),
        (seconds(join=max), "they take turns"),
    ],
    check.bytes_of_a_batch: [
        (read(of=np.size), "is read once"),
        (read(over=lambda experts, groups: len(groups)), "this is for a batch"),
        (read(over=lambda experts, groups: 1), "this is for the whole text"),
        (read(of=lambda groups: len(np.unique(groups))), "keeps none for the next"),
        (lambda experts, batch, size: read()(experts, batch, 1), "each has `size` bytes"),
        (
            lambda experts, batch, size: sum(read()(column[:, None], batch, size) for column in experts.T),
            "is read once",
        ),
        (lambda experts, batch, size: (experts.max() + 1) * size / batch, "the whole layer"),
    ],
}

RIGHT = {
    check.lru_hits: [by_distance, with_an_ordered_dictionary],
    check.oracle_drops: [crossed_out, sorted_by_next_use],
    check.seconds_per_token: [
        lambda weights, bits, hit_rate, bandwidth, compute: (
            compute + (weights - hit_rate * weights) / (8 * bandwidth / bits)
        ),
        lambda *given: np.float32(seconds()(*given)),
    ],
    check.bytes_of_a_batch: [with_sets, with_a_table],
}
