"""How often a cache has the expert that a token needs: policies compared on a recorded routing, and with chance.

    hit_rate(experts, slots, "lru")      (N, K) experts of consecutive tokens in one layer → share of uses that are hits

The experts of a token are in memory together, so none of them makes room for another of the same token.

    nothing    keeps nothing from one token to the next
    random     a random one makes room
    fifo       the one that was read first
    lru        the one whose last use is longest ago
    oracle     the one whose next use is farthest away: no policy can do better (Bélády 1966), and none can know it

``storage.expert_cache`` is the cache that really holds weights.  Lesson: lessons/53_mixtral_on_a_laptop.ipynb
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from minimoe.core.arrays import Array
from minimoe.core.errors import UserError
from minimoe.storage.expert_cache import ExpertCache

POLICIES = ("nothing", "random", "fifo", "lru", "oracle")


def hit_rate(experts: Array | Sequence[Sequence[int]], slots: int, policy: str, seed: int = 0) -> float:
    """The share of the N·K uses that find their expert among ``slots`` experts in memory.

    Raises:
        UserError: the policy is none of ``POLICIES``, or the slots do not hold the experts of one token.
    """
    if policy not in POLICIES:
        raise UserError(f"there is no policy {policy!r:.40}: choose one of {', '.join(POLICIES)}.")
    rows = np.asarray(experts).tolist()
    if slots < max(map(len, rows), default=1):
        raise UserError(f"slots {slots} do not hold the {len(rows[0])} experts of a token: give at least that many.")
    rng = np.random.default_rng(seed)
    uses = [expert for row in rows for expert in row]
    next_use = _next_uses(uses)
    held: dict[int, tuple[int, int, float]] = {}  # expert → when it was read, last used, and is used next
    hits = now = 0
    for row in rows:
        if policy == "nothing":
            held.clear()
        for expert in row:
            read = now
            if expert in held:
                hits += 1
                read = held[expert][0]
            elif len(held) >= slots:
                free = [one for one in held if one not in row]
                held.pop(_leaves(free, held, policy, rng))
            held[expert] = read, now, next_use[now]
            now += 1
    return hits / max(len(uses), 1)


def _leaves(free: list[int], held: dict[int, tuple[int, int, float]], policy: str, rng: np.random.Generator) -> int:
    """The expert that makes room, among those that the token does not use."""
    if policy == "random":
        return free[int(rng.integers(len(free)))]
    if policy == "oracle":
        return max(free, key=lambda one: held[one][2])
    return min(free, key=lambda one: held[one][0 if policy == "fifo" else 1])


def _next_uses(uses: Sequence[int]) -> list[float]:
    """For each use, when the same expert is used next; infinity if never."""
    found: list[float] = [math.inf] * len(uses)
    later: dict[int, int] = {}
    for at in range(len(uses) - 1, -1, -1):
        found[at] = later.get(uses[at], math.inf)
        later[uses[at]] = at
    return found


def by_layers(experts: Array, slots: int, shares: bool) -> float:
    """The hit rate of L layers (L, N, K) that take turns and have ``slots`` together, token by token.

    With ``shares`` this is ``ExpertCache``, in which each layer has slots of its own; without ``shares``, one queue
    serves all layers, and the expert whose last use is longest ago leaves, whatever its layer.
    """
    layers, tokens, together = experts.shape
    if shares:
        cache = ExpertCache(1, slots, lambda key, content: None, layers, together)
    else:
        cache = ExpertCache(1, slots, lambda key, content: None, 1, 1)
    count = int(experts.max()) + 1
    for token in range(tokens):
        for layer in range(layers):
            for expert in experts[layer, token].tolist():
                with cache.use((layer, expert) if shares else (0, layer * count + expert)):
                    pass
    return cache.phases[""].hit_rate


def even(rng: np.random.Generator, tokens: int, experts: int, together: int) -> Array:
    """(N, K) experts, drawn evenly and independently for each token: the level of chance."""
    return rng.random((tokens, experts)).argsort(1)[:, :together]


def distinct(experts: Array, batch: int) -> float:
    """How many different experts ``batch`` tokens (rows of (N, K)) need together, on average over whole batches."""
    whole = len(experts) // batch * batch
    groups = experts[:whole].reshape(-1, batch * experts.shape[1])
    return float(np.mean([len(np.unique(group)) for group in groups]))
