"""A routing: which token goes to which expert, and with what weight. The interface between routers and experts.

A routing is a sparse matrix, tokens × experts. A router may make K entries per token, a varying number per token, or a
fixed number per expert. The mixture-of-experts layer gets them sorted by expert, so that the tokens of one expert are
neighbours and can be multiplied by its weights in one dense product.

Sorting instead of padding: Gale et al. 2022, arXiv 2211.15841.  Lesson: lessons/09_moe_layer.ipynb
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

from minimoe.core.arrays import Array, array_module, to_host
from minimoe.core.errors import UserError


class Choice(NamedTuple):
    """The decision of a router with K experts per token, before sorting."""

    experts: Array  # (N, K)  best first
    weights: Array  # (N, K)  in the same order


class Routing(NamedTuple):
    """The M entries of a routing, sorted by expert."""

    counts: list[int]  # E: entries of each expert, on the host; they add up to M
    token: Array  # (M,)  the token of each entry
    weight: Array  # (M,)  the weight of each entry
    place: Array  # (N, K)  the index of each of a token's entries among the M, best first; M for a missing entry
    dropped: Any = 0  # number of entries that were refused by a full expert


class RouterStats(NamedTuple):
    """Sums over tokens, from which the balancing losses are computed; or the gradient of a loss with respect to them.

    The sums of the shards of a batch add up, so the losses do not depend on how a batch is split.
    """

    tokens: Any  # ()   N
    assignments: Array  # (E,)  how often each expert was chosen; a count, which has no gradient
    probability: Array  # (E,)  Σ_t softmax(c_t), the full softmax of the clean logits
    importance: Array  # (E,)  Σ_t w_t, with weight 0 for an expert that was not chosen
    load: Array  # (E,)  Σ_t P(t, ·), the probability of being chosen; if not estimated, the assignments
    squared_lse: Array  # ()    Σ_t (log Σ_e exp c_te)²
    by_sequence: Array  # ()    Σ over sequences of E Σ_e f_e Σ_t p_te, f the shares of the sequence's own assignments
    entropy: Array  # ()    Σ_t −Σ_e p log p of softmax(c_t), in nats; reported, not trained


class Dispatch(NamedTuple):
    """How the entries of a choice are sorted by expert."""

    counts: list[int]  # E: entries of each expert, on the host; they add up to M
    token: Array  # (M,)  the token of each sorted entry
    order: Array  # (M,)  the index of each sorted entry before sorting, counted row by row
    place: Array  # (N, K)  the index of each entry after sorting; M for an entry that is left out


def sort_by_expert(experts: Array, count: int, kept: Array | None = None) -> Dispatch:
    """experts (N, K) → a stable sort of its entries; entries that are not ``kept`` (N·K bools) are left out."""
    xp = array_module(experts)
    entries = experts.reshape(-1)
    if kept is not None:  # the others count as entries of an expert after the last, which is cut off below
        entries = xp.where(kept.reshape(-1), entries, count)
    order = xp.argsort(entries, kind="stable")
    place = xp.empty_like(order)
    place[order] = xp.arange(len(order))  # the inverse permutation
    # Where the entries of each expert end. bincount would count them too, but on a GPU it synchronises twice.
    stops = to_host(xp.searchsorted(entries[order], xp.arange(count), side="right"))  # a layer's only synchronisation
    counts = [stop - start for start, stop in pairwise([0, *stops.tolist()])]
    M = sum(counts)
    if len(order) > M:
        order, place = order[:M], xp.minimum(place, M)
    return Dispatch(counts, order // experts.shape[1], order, place.reshape(experts.shape))


def from_choice(choice: Choice, experts: int, kept: Array | None = None, dropped: Any = 0) -> Routing:
    """The routing of K experts per token; entries that are not ``kept`` (N·K bools) are left out."""
    counts, token, order, place = sort_by_expert(choice.experts, experts, kept)
    return Routing(counts, token, choice.weights.reshape(-1)[order], place, dropped)


def skip_second(routing: Routing, below: float) -> Routing:
    """A routing with two places per token, without the second entries whose weight is below ``below`` times the first.

    The first expert then gets the weight of both, so the weights of a token add up to the same as before. Entries are
    skipped only in evaluation: the router's backward pass knows nothing of this (Lu et al. 2024, arXiv 2402.14800).

    Raises:
        UserError: the routing does not have two places for experts per token.
    """
    if routing.place.shape[1] != 2:
        raise UserError(
            f"a token has {routing.place.shape[1]} experts here, and only the second of two can be skipped: leave "
            "skip_below out, or use a model with active_experts 2."
        )
    xp = array_module(routing.weight)
    weights = by_token(routing.weight, routing.place)  # (N, 2)
    experts = experts_by_token(routing)
    skipped = weights[:, 1] < below * weights[:, 0]
    kept = experts >= 0
    kept[:, 1] &= ~skipped
    first = xp.where(skipped, weights[:, 0] + weights[:, 1], weights[:, 0])
    choice = Choice(experts, xp.stack([first, weights[:, 1]], axis=1))
    return from_choice(choice, len(routing.counts), kept.reshape(-1), routing.dropped)


def by_token(values: Array, place: Array) -> Array:
    """values (M, ...) of the sorted entries → (N, K, ...), the values of each token, best first; 0 if missing."""
    return _with_absent(values, place)[place]


def combine(rows: Array, place: Array, weights: Array | None = None) -> Array:
    """rows (M, D) of the sorted entries → (N, D), the sum of each token's rows, weighted with weights (N, K) if given.

    The sum is taken one choice at a time, so that there is never an array (N, K, D) of all rows.
    """
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
    """The experts of each token, best first, (N, K); −1 for a missing entry."""
    xp = array_module(routing.place)
    expert = xp.repeat(xp.arange(len(routing.counts)), routing.counts)  # (M,)
    return xp.concatenate([expert, xp.full(1, -1)])[routing.place]


def _with_absent(values: Array, place: Array) -> Array:
    """``values`` (M, ...), followed by a row of zeros at index M if some entry is missing."""
    if len(values) == place.size:  # every token has K entries
        return values
    xp = array_module(values)
    return xp.concatenate([values, xp.zeros((1, *values.shape[1:]), values.dtype)])
