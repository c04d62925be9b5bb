"""Checks of lesson 53: a Mixtral on a laptop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minimoe.analysis.cache_policies import even, hit_rate
from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, values
from minimoe.exercises.feedback import Report, first_failure


def lru_hits(answer: Answer) -> Report:
    """(experts (N,), slots) → how many uses find their expert in a cache that drops the one unused for longest."""
    rng = np.random.default_rng(53)
    return first_failure(
        _lru_hits(answer, rng.integers(experts, size=40), slots) for experts, slots in ((5, 3), (6, 2))
    )


def _lru_hits(answer: Answer, experts: Array, slots: int) -> Report:
    rows = experts[:, None]
    hits = round(len(experts) * hit_rate(rows, slots, "lru"))
    return values(
        answer,
        (experts, slots),
        {"hits": np.array(hits)},
        mistakes={
            "hits": {
                "these are the misses.": np.array(len(experts) - hits),
                "an expert that is found becomes the latest one: move it to the end.": np.array(
                    round(len(experts) * hit_rate(rows, slots, "fifo"))
                ),
                "the cache holds one expert more than there are slots.": np.array(
                    round(len(experts) * hit_rate(rows, slots + 1, "lru"))
                ),
                "the cache holds one expert fewer than there are slots: make room only when it is full.": np.array(
                    round(len(experts) * hit_rate(rows, max(slots - 1, 1), "lru"))
                ),
                "this drops the expert that was used last, which is the one at the end.": np.array(
                    _hits_of_the_newest_dropped(experts, slots)
                ),
                "this is the share of hits, but their number was asked for.": np.array(hits / len(experts)),
            }
        },
    )


def _hits_of_the_newest_dropped(experts: Array, slots: int) -> int:
    held: list[int] = []
    hits = 0
    for expert in experts.tolist():
        if expert in held:
            hits += 1
            held.remove(expert)
        elif len(held) >= slots:
            held.pop()
        held.append(expert)
    return hits


def oracle_drops(answer: Answer) -> Report:
    """(held, future) → the expert in memory that an oracle drops: the one that is used next after all others."""
    cases = (
        ([3, 8, 9, 4, 7, 5], [4, 3, 7, 5, 8, 1, 9, 9, 3, 5, 4, 8]),
        ([8, 5, 7, 6], [6, 8, 5, 6]),  # 7 is never used again
    )
    return first_failure(_oracle_drops(answer, *case) for case in cases)


def _oracle_drops(answer: Answer, held: list[int], future: Sequence[int]) -> Report:
    coming = np.array(future)
    first = {one: _first(future, one) for one in held}
    last = {one: _first(future[::-1], one) for one in held}
    uses = {one: list(future).count(one) for one in held}
    return values(
        answer,
        (list(held), coming),
        {"expert": np.array(max(held, key=lambda one: first[one]))},
        mistakes={
            "expert": {
                "this expert is used next before all others in memory, so it should stay.": np.array(
                    min(held, key=lambda one: first[one])
                ),
                "this is a place in the list, but the expert at that place was asked for.": np.array(
                    held.index(max(held, key=lambda one: first[one]))
                ),
                "look at the next use of each expert, not at its last one.": np.array(
                    min(held, key=lambda one: last[one])
                ),
                "look at when an expert is used next, not at how often.": np.array(
                    min(held, key=lambda one: uses[one])
                ),
                "this is the first of the list, but its order says nothing about what comes.": np.array(held[0]),
                "this is the last of the list, but its order says nothing about what comes.": np.array(held[-1]),
                "an expert that is never used again should leave first.": np.array(
                    max((one for one in held if uses[one]), key=lambda one: first[one])
                ),
            }
        },
    )


def _first(future: Sequence[int], expert: int) -> int:
    return list(future).index(expert) if expert in future else len(future)


def seconds_per_token(answer: Answer) -> Report:
    """(weights, bits, hit_rate, bandwidth, compute) → seconds for a token whose reading and computing take turns."""
    cases = ((11.3e9, 4.5, 0.3, 7.0e9, 1.9), (2.0e8, 16.0, 0.75, 5.0e8, 0.05))
    return first_failure(_seconds(answer, *case) for case in cases)


def _seconds(answer: Answer, weights: float, bits: float, hit_rate: float, bandwidth: float, compute: float) -> Report:
    size = weights * bits / 8
    reading = size * (1 - hit_rate) / bandwidth
    return values(
        answer,
        (weights, bits, hit_rate, bandwidth, compute),
        {"seconds": np.array(reading + compute)},
        mistakes={
            "seconds": {
                "eight bits are one byte, and the bandwidth is in bytes per second.": np.array(8 * reading + compute),
                "hits are not read; the misses are.": np.array(size * hit_rate / bandwidth + compute),
                "without a cache it would be this; hits are not read.": np.array(size / bandwidth + compute),
                "this is the reading alone; the products come on top.": np.array(reading),
                "hits are not read, but they are computed: every token has all its products.": np.array(
                    reading + compute * (1 - hit_rate)
                ),
                "this would be right if a layer were read while another is computed; here they take turns.": np.array(
                    max(reading, compute)
                ),
            }
        },
    )


def bytes_of_a_batch(answer: Answer) -> Report:
    """(experts (N, K), batch, size) → bytes per token, if a batch reads every expert that it needs once."""
    rng = np.random.default_rng(5)
    cases = ((even(rng, 24, 8, 2), 6, 100), (even(rng, 30, 5, 3), 10, 7))
    return first_failure(_bytes(answer, *case) for case in cases)


def _bytes(answer: Answer, experts: Array, batch: int, size: int) -> Report:
    tokens, active = experts.shape
    groups = experts.reshape(-1, batch * active)
    read = sum(len(np.unique(group)) for group in groups)
    return values(
        answer,
        (experts, batch, size),
        {"bytes": np.array(read * size / tokens)},
        mistakes={
            "bytes": {
                "an expert that several tokens of a batch need is read once.": np.array(float(active * size)),
                "this is for a batch; divide by its tokens.": np.array(read * size / len(groups)),
                "this is for the whole text; divide by its tokens.": np.array(float(read * size)),
                "this reads each expert once in the whole text, but a batch keeps none for the next.": np.array(
                    len(np.unique(experts)) * size / tokens
                ),
                "an expert that is the first of one token and the second of another is read once.": np.array(
                    sum(len(np.unique(column)) for group in groups for column in group.reshape(batch, active).T)
                    * size
                    / tokens
                ),
                "this reads the whole layer for each batch, also the experts that nobody chose.": np.array(
                    (experts.max() + 1) * size / batch
                ),
                "this is the number of experts; each has `size` bytes.": np.array(read / tokens),
            }
        },
    )
