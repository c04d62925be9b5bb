"""A routing: which token goes to which expert, and with what weight. The interface between routers and experts.

A routing is a sparse matrix, tokens × experts. A router makes its entries in any way: K per token, a varying number per
token, or a fixed number per expert. The mixture-of-experts layer sees them sorted by expert, so that the tokens of one
expert are neighbours and their product with its weights is one dense product.

Sorting instead of padding: Gale et al. 2022, arXiv 2211.15841.  Lesson: lessons/09_moe_layer.ipynb
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

from minimoe.core.arrays import Array, array_module, to_host


class Choice(NamedTuple):
    """What a router with K experts per token decides, before sorting."""

    experts: Array  # (N, K)  best first
    weights: Array  # (N, K)  in the same order


class Routing(NamedTuple):
    """The M entries of a routing, sorted by expert."""

    counts: list[int]  # E: entries of each expert, on the host; they add up to M
    token: Array  # (M,)  the token of each entry
    weight: Array  # (M,)  the weight of each entry
    place: Array  # (N, K)  where a token's entries stand among the M, best first; M where it has fewer than K
    dropped: Any = 0  # entries that the capacity of their expert refused


class RouterStats(NamedTuple):
    """Sums over tokens, of which the balancing losses are made; also the gradient of a loss with respect to each sum.

    Sums over the shards of a batch add up, so the losses do not depend on how a batch is split.
    """

    tokens: Any  # ()   N
    assignments: Array  # (E,)  how often each expert was chosen; a count, which has no gradient
    probability: Array  # (E,)  Σ_t softmax(c_t), the full softmax of the clean logits
    importance: Array  # (E,)  Σ_t w_t, zero where not chosen
    load: Array  # (E,)  Σ_t P(t, ·), the chance of being chosen; the assignments where that is not estimated
    squared_lse: Array  # ()    Σ_t (log Σ_e exp c_te)²
    entropy: Array  # ()    Σ_t −Σ_e p log p of softmax(c_t), in nats; reported, not trained


class Dispatch(NamedTuple):
    """How the entries of a choice are sorted by expert."""

    counts: list[int]  # E: entries of each expert, on the host; they add up to M
    token: Array  # (M,)  the token of each sorted entry
    order: Array  # (M,)  the entry, counted row by row, that stands at each place
    place: Array  # (N, K)  the place of each entry; M for one that is left out


def sort_by_expert(experts: Array, count: int, kept: Array | None = None) -> Dispatch:
    """experts (N, K) → the stable sorting of its entries; entries that are not ``kept`` (N·K bools) are left out."""
    xp = array_module(experts)
    entries = experts.reshape(-1)
    if kept is not None:
        entries = xp.where(kept.reshape(-1), entries, count)
    order = xp.argsort(entries, kind="stable")
    place = xp.empty_like(order)
    place[order] = xp.arange(len(order))
    # Where each expert's entries stop. bincount says as much, but on a GPU it waits for two results of its own.
    stops = to_host(xp.searchsorted(entries[order], xp.arange(count), side="right"))  # the one wait of a layer
    counts = [stop - start for start, stop in pairwise([0, *stops.tolist()])]
    M = sum(counts)
    if len(order) > M:
        order, place = order[:M], xp.minimum(place, M)
    return Dispatch(counts, order // experts.shape[1], order, place.reshape(experts.shape))


def from_choice(choice: Choice, experts: int, kept: Array | None = None, dropped: Any = 0) -> Routing:
    """The routing of K experts per token; entries that are not ``kept`` (N·K bools) are left out."""
    counts, token, order, place = sort_by_expert(choice.experts, experts, kept)
    return Routing(counts, token, choice.weights.reshape(-1)[order], place, dropped)


def by_token(values: Array, place: Array) -> Array:
    """values (M, ...) of the sorted entries → those of each token, best first, zero where it has fewer: (N, K, ...)."""
    return _with_absent(values, place)[place]


def combine(rows: Array, place: Array, weights: Array | None = None) -> Array:
    """rows (M, D) of the sorted entries → the sum of each token's rows, weighted by weights (N, K) if given: (N, D)."""
    rows = _with_absent(rows, place)
    total = None
    for k in range(place.shape[1]):
        term = rows.take(place[:, k], axis=0)
        if weights is not None:
            term *= weights[:, k, None]
        total = term if total is None else array_module(term).add(total, term, out=total)
    assert total is not None
    return total


def experts_by_token(routing: Routing) -> Array:
    """The experts of each token, best first (N, K); −1 where it has fewer than K."""
    xp = array_module(routing.place)
    expert = xp.repeat(xp.arange(len(routing.counts)), xp.asarray(routing.counts))  # (M,)
    return xp.concatenate([expert, xp.full(1, -1)])[routing.place]


def _with_absent(values: Array, place: Array) -> Array:
    """``values`` (M, ...), followed by a zero at index M where some entry is absent."""
    if len(values) == place.size:  # every token has K entries
        return values
    xp = array_module(values)
    return xp.concatenate([values, xp.zeros((1, *values.shape[1:]), values.dtype)])
