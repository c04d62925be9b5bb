"""The capacity of an expert: how many entries of one sequence it accepts.

    capacity = ⌈ factor · K·T / E ⌉

Entries are accepted in the order of the tokens: a later token loses its entry for an expert that is full. The entries
of each sequence (GShard calls it a group) are counted separately. The result therefore does not depend on how a batch
is split, and earlier tokens do not depend on later ones. Padding is not a token: it uses no capacity, and its entries
are dropped.

Lepikhin et al. 2020, arXiv 2006.16668.  Lesson: lessons/09_moe_layer.ipynb
"""

from __future__ import annotations

import math
from typing import Any

from minimoe.core.arrays import Array, array_module
from minimoe.layers.routing import Choice, Routing, from_choice


def limit(choice: Choice, batch: int, experts: int, factor: float | None, mask: Array | None) -> Routing:
    """The routing of a choice for ``batch`` sequences, without the entries that the capacity refuses.

    If ``factor`` is None, all entries are kept.
    """
    if factor is None:
        return from_choice(choice, experts)
    kept, asked = admit(choice.experts.reshape(batch, -1, choice.experts.shape[1]), experts, factor, mask)
    routing = from_choice(choice, experts, kept)
    return routing._replace(dropped=asked - sum(routing.counts))


def admit(experts: Array, count: int, factor: float, mask: Array | None) -> tuple[Array, Any]:
    """experts (B, T, K) → which entries are within the capacity, (B, T·K) bools, and how many entries there were.

    Padding, where ``mask`` (B, T) is 0, is not counted.
    """
    B, T, K = experts.shape
    entries = experts.reshape(B, T * K)
    if mask is None:
        return within_capacity(entries, count, math.ceil(factor * K * T / count)), B * T * K
    real = mask.astype(bool).repeat(K, axis=1)  # (B, T·K)
    capacity = array_module(mask).ceil(factor * real.sum(1, keepdims=True) / count)  # (B, 1)
    return within_capacity(entries, count, capacity, real), real.sum()


def within_capacity(experts: Array, count: int, capacity: int | Array, real: Array | None = None) -> Array:
    """experts (B, T·K), the entries of each sequence in reading order → which are within the capacity, (B, T·K) bools.

    An entry's position in the queue of its expert is the number of entries up to it that chose the same expert.
    ``capacity`` is one number for all sequences, or (B, 1). Entries that are not ``real`` (B, T·K) do not join a queue.
    """
    xp = array_module(experts)
    one_hot = experts[:, :, None] == xp.arange(count)  # (B, T·K, E)
    if real is not None:
        one_hot &= real[:, :, None]
    queue = xp.cumsum(one_hot, axis=1)  # the entry itself included, so the first has position 1
    kept = xp.take_along_axis(queue, experts[:, :, None], axis=2)[:, :, 0] <= capacity
    return kept if real is None else kept & real
