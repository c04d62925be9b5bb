"""The mixture-of-experts layer: dispatch every token to its experts, let them work, combine what comes back.

    y_t = Σ_k w_tk · Expert_{S_tk}(x_t)

A routing is a sparse matrix, tokens × experts. Dispatch sorts its entries by expert, so that the tokens of one expert
are neighbours and the product with its weights is a dense one; combine undoes the sorting. Nothing is padded and no
token is dropped, unless a capacity is asked for: then every expert takes at most

    capacity = ⌈ factor · K·T / E ⌉

tokens of each sequence, first come, first served, and later ones lose that entry of the matrix. Counting by sequence
(GShard's group) makes the result the same however a batch is split, and earlier tokens independent of later ones.
Padding is no token: it takes no place, and loses its entries.

Workers of a group may keep experts of their own; the sorted rows then travel to the owners of their experts and back.

Sorting instead of padding: Gale et al. 2022, arXiv 2211.15841. Capacity: Lepikhin et al. 2020, arXiv 2006.16668.
Lesson: lessons/09_moe_layer.ipynb
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe import expert_parallel
from minimoe.arrays import Array, array_module, to_host
from minimoe.config import ModelConfig
from minimoe.data_parallel import ALONE, Group
from minimoe.expert_parallel import Journey
from minimoe.layers import router, swiglu
from minimoe.layers.router import Router, RouterStats, Routing
from minimoe.layers.swiglu import Experts


class MoE(NamedTuple):
    router: Router
    experts: Experts


class Dispatch(NamedTuple):
    """How the N·K entries of a routing are sorted by expert; dropped entries come last."""

    counts: list[int]  # E: entries of each expert
    token: Array  # (N·K,)  the token of each sorted entry
    order: Array  # (N·K,)  the entry, counted row by row, that stands at each sorted place
    place: Array  # (N, K)  the sorted place of each entry


class Cache(NamedTuple):
    routing: Routing
    dispatch: Dispatch
    y_sorted: Array  # (N·K, D)  before weighting
    router: router.Cache
    experts: swiglu.Cache
    journey: Journey


def init(
    rng: np.random.Generator, config: ModelConfig, output_std: float | None = None, dtype: DTypeLike = np.float32
) -> MoE:
    """A router and a stack of experts in the shapes of ``config``."""
    return MoE(
        router.init(rng, config.width, config.experts, noisy=config.noisy_gating, dtype=dtype),
        swiglu.init(rng, config.experts, config.width, config.expert_width, output_std, dtype),
    )


def forward(
    params: MoE,
    x: Array,
    config: ModelConfig,
    *,
    noise: Array | None = None,
    capacity_factor: float | None = None,
    estimate_load: bool = True,
    mask: Array | None = None,
    group: Group = ALONE,
) -> tuple[Array, RouterStats, int, Cache]:
    """x (B, T, D) → y (B, T, D), the router's sums, and how many of the N·K entries were dropped.

    ``noise`` (B, T, E) and ``capacity_factor`` belong to training; without them routing is exact and dropless.
    ``mask`` (B, T) of 0 and 1 keeps padding out of the sums, and out of the capacity and what it drops. In a ``group``
    everyone must pass its tokens at the same time.
    """
    B, T, D = x.shape
    x_rows = x.reshape(-1, D)
    routing, stats, router_cache = router.forward(
        params.router,
        x_rows,
        config.active_experts,
        renormalize=config.renormalize,
        noise=None if noise is None else noise.reshape(B * T, -1),
        estimate_load=estimate_load,
        mask=mask,
    )
    kept, asked = None, 0
    if capacity_factor is not None:
        kept, asked = seat(routing.experts.reshape(B, T, -1), config.experts, capacity_factor, mask)
    dispatch = sort_by_expert(routing.experts, config.experts, kept)
    journey = expert_parallel.begin(dispatch.counts, group)
    x_sorted = x_rows.take(dispatch.token, axis=0)
    y_own, experts_cache = swiglu.forward(journey.own(params.experts), journey.there(x_sorted), journey.counts)
    y_sorted = journey.back(y_own, len(x_sorted))
    y = combine(y_sorted, dispatch.place, routing.weights)
    dropped = 0 if kept is None else asked - sum(dispatch.counts)
    cache = Cache(routing, dispatch, y_sorted, router_cache, experts_cache, journey)
    return y.reshape(B, T, D), stats, dropped, cache


def backward(params: MoE, cache: Cache, dy: Array, dstats: RouterStats | None) -> tuple[Array, MoE]:
    """dy (B, T, D), and the gradient of the losses by the router's sums → dx (B, T, D) and every gradient.

    In a group, the experts' are those of this worker's own experts, for the tokens of all.

    y_t = Σ_k w_tk e_tk is a product of two things that learn, the weight and the expert's answer, and x_t reaches y_t
    through its router and through its K experts:

        dw_tk = dy_t · e_tk,    de_tk = w_tk dy_t,    dx_t = Σ_k dx of expert S_tk + dx of the router
    """
    xp = array_module(dy)
    routing, dispatch, y_sorted, router_cache, experts_cache, journey = cache
    dy_sorted = dy.reshape(-1, dy.shape[-1]).take(dispatch.token, axis=0)
    dweights_sorted = xp.einsum("md,md->m", dy_sorted, y_sorted)
    dy_sorted *= routing.weights.reshape(-1)[dispatch.order][:, None]
    dx_own, dexperts = swiglu.backward(journey.own(params.experts), experts_cache, journey.there(dy_sorted))
    dx = combine(journey.back(dx_own, len(dy_sorted)), dispatch.place)
    dx_router, drouter = router.backward(params.router, router_cache, dweights_sorted[dispatch.place], dstats)
    dx += dx_router
    return dx.reshape(dy.shape), MoE(drouter, dexperts)


def seat(experts: Array, count: int, factor: float, mask: Array | None) -> tuple[Array, Any]:
    """experts (B, T, K) → which entries find a place in the capacity, (B, T·K) bool, and how many asked for one."""
    B, T, K = experts.shape
    entries = experts.reshape(B, T * K)
    if mask is None:
        return within_capacity(entries, count, math.ceil(factor * K * T / count)), B * T * K
    real = mask.astype(bool).repeat(K, axis=1)  # (B, T·K)
    capacity = array_module(mask).ceil(factor * real.sum(1, keepdims=True) / count)  # (B, 1)
    return within_capacity(entries, count, capacity, real), real.sum()


def within_capacity(experts: Array, count: int, capacity: int | Array, real: Array | None = None) -> Array:
    """experts (B, T·K), the entries of each sequence in reading order → which of them find a place, (B, T·K) bool.

    An entry's place in the queue of its expert is the number of entries before it that chose the same one. ``capacity``
    is one for all sequences or (B, 1); entries that are not ``real`` (B, T·K) do not queue, and find no place.
    """
    xp = array_module(experts)
    one_hot = experts[:, :, None] == xp.arange(count)  # (B, T·K, E)
    if real is not None:
        one_hot &= real[:, :, None]
    queue = xp.cumsum(one_hot, axis=1)
    kept = xp.take_along_axis(queue, experts[:, :, None], axis=2)[:, :, 0] <= capacity
    return kept if real is None else kept & real


def sort_by_expert(experts: Array, count: int, kept: Array | None = None) -> Dispatch:
    """experts (N, K) → the stable sorting of its entries; entries that are not ``kept`` go behind all others."""
    xp = array_module(experts)
    entries = experts.reshape(-1)
    if kept is not None:
        entries = xp.where(kept.reshape(-1), entries, count)
    order = xp.argsort(entries, kind="stable")
    place = xp.empty_like(order)
    place[order] = xp.arange(len(order))
    # where each expert's entries stop; bincount says as much, but on a GPU it waits for two results of its own
    stops = to_host(xp.searchsorted(entries[order], xp.arange(count), side="right"))  # the one wait in a layer
    counts = [stop - start for start, stop in pairwise([0, *stops.tolist()])]
    return Dispatch(counts, order // experts.shape[1], order, place.reshape(experts.shape))


def combine(sorted_rows: Array, place: Array, weights: Array | None = None) -> Array:
    """sorted_rows (N·K, D) back in the order of tokens, the K of each token added up, weighted if asked: (N, D)."""
    total = None
    for k in range(place.shape[1]):
        rows = sorted_rows.take(place[:, k], axis=0)
        if weights is not None:
            rows *= weights[:, k, None]
        total = rows if total is None else array_module(rows).add(total, rows, out=total)
    assert total is not None
    return total
