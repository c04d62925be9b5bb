"""Expert choice: instead of tokens choosing experts, each expert takes the tokens of a sequence that suit it best.

    p = softmax(x W)             over the experts, as for other routers
    c = ⌈factor · K·T / E⌉       the tokens that each expert takes of a sequence of T; at most all of them
    expert e takes the c tokens with the largest p_e; the earliest token wins a tie
    w = p_e                      raw, not renormalised

Every expert has the same load by construction, so no balancing loss is needed. A token gets as many experts as want it,
from none to all E. Padding is never taken, and T counts real tokens only. Each sequence is treated by itself, so what
else is in the batch does not matter.

An expert compares a token with all others of its sequence, the later ones included: if a later token suits it better,
an earlier one loses its place. Such a layer must not be used in a language model; ``expert_threshold`` may be.

Zhou et al. 2022, arXiv 2202.09368.  Lesson: lessons/23_who_may_look_ahead.ipynb
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core.arrays import Array, array_module
from minimoe.core.config import ModelConfig
from minimoe.layers import routing
from minimoe.layers.mode import EVALUATION, Mode
from minimoe.layers.routers import scores
from minimoe.layers.routing import RouterStats, Routing

LOOKS_AHEAD = True
"""A later token can take an earlier one's place."""

VARIES = True
"""A token gets as many experts as want it."""

BALANCE_LOSS = 0.0
"""The load is equal by construction."""


class ExpertChoice(NamedTuple):
    w_gate: Array  # (D, E)


class Cache(NamedTuple):
    x: Array  # (N, D)
    probability: Array  # (N, E)
    lse: Array  # (N, 1)
    taken: Array  # (N, E)  bool
    experts: Array  # (N, ·)  the experts of each token, best first
    place: Array  # (N, ·)  the index of each of a token's entries in the routing
    mask: Array | None  # (N, 1)
    shares: Array | None  # (B, E)  of each sequence, if its balance is summed up
    quota: list[int]  # B: c, the tokens that each expert takes of each sequence
    shape: tuple[int, ...]  # (B, T, D)


def check(config: ModelConfig) -> None:
    """Allows every number of experts; ``decoder.check_causal`` refuses this router in a language model."""


def init(rng: np.random.Generator, config: ModelConfig, dtype: DTypeLike = np.float32) -> ExpertChoice:
    """W drawn from N(0, 0.02²), so that the first probabilities are nearly equal."""
    return ExpertChoice((0.02 * rng.standard_normal((config.width, config.experts))).astype(dtype))


def blank(config: ModelConfig, array: Callable[[tuple[int, ...]], Array]) -> ExpertChoice:
    """The parameters, each made by calling ``array`` with its shape."""
    return ExpertChoice(array((config.width, config.experts)))


def draw_noise(rng: np.random.Generator, config: ModelConfig, shape: tuple[int, ...], dtype: DTypeLike) -> None:
    """None: the router needs no noise, since no expert can be left without tokens."""


def forward(
    params: ExpertChoice, x: Array, config: ModelConfig, mode: Mode = EVALUATION
) -> tuple[Routing, RouterStats, Cache]:
    """x (B, T, D) → the routing of its N tokens, c entries of each sequence per expert, and the sums over them.

    The factor in c is the mode's capacity factor, or 1 if the mode has none.
    """
    B, T, D = x.shape
    rows = x.reshape(-1, D)
    mask = None if mode.mask is None else mode.mask.reshape(-1, 1).astype(x.dtype)  # (N, 1)

    logits = rows @ params.w_gate  # (N, E)
    probability, lse = scores.softmax(logits)
    factor = 1.0 if mode.capacity_factor is None else mode.capacity_factor
    real = [T] * B if mode.mask is None else [int(count) for count in mode.mask.sum(1).tolist()]
    quota = [min(math.ceil(factor * config.active_experts * tokens / config.experts), tokens) for tokens in real]
    taken = best_tokens(_ranked(probability, mask).reshape(B, T, -1), quota).reshape(B * T, -1)
    choice, exists = scores.choice_of(taken, probability)
    made = routing.from_choice(choice, config.experts, exists)

    chosen = taken.astype(x.dtype)
    shares = scores.shares_by_sequence(chosen, B, mask) if mode.balance_by_sequence else None
    stats = scores.sums(logits, probability, lse, chosen, chosen * probability, chosen, mask, shares)
    cache = Cache(rows, probability, lse, taken, choice.experts, made.place, mask, shares, quota, x.shape)
    return made, stats, cache


def best_tokens(p: Array, quota: list[int]) -> Array:
    """p (B, T, E) → which tokens each expert takes, (B, T, E) bool: its ``quota[b]`` largest along the axis of tokens.

    The sort is along T: along E, it would be the tokens that choose.
    """
    xp = array_module(p)
    best_first = xp.argsort(-p, axis=1, kind="stable")  # stable: the earliest token wins a tie
    within = xp.arange(p.shape[1])[None, :, None] < xp.asarray(quota)[:, None, None]  # (B, T, 1)
    taken = xp.zeros(p.shape, bool)
    xp.put_along_axis(taken, best_first, xp.broadcast_to(within, p.shape), axis=1)
    return taken


def backward(
    params: ExpertChoice, cache: Cache, dweight: Array, dstats: RouterStats | None
) -> tuple[Array, ExpertChoice]:
    """dweight (M,), and the gradient with respect to each sum → dx (B, T, D) and the gradient of W.

    The choice itself has no slope. Each weight is one entry of p, so dweight goes to that entry, and the full softmax
    of each *token* leads back, although the choice was made along the other axis:

        dp = 1[taken] ⊙ dw,    dz = p ⊙ (dp − Σ_e p dp)
    """
    xp = array_module(dweight)
    p = cache.probability
    dp = xp.zeros_like(p)
    xp.put_along_axis(dp, cache.experts, routing.by_token(dweight, cache.place), axis=1)
    if dstats is not None:  # the importance is the sum of the weights of all entries
        dp += cache.taken * dstats.importance
    dlogits = p * (dp - (p * dp).sum(1, keepdims=True))
    if dstats is not None:
        dlogits += scores.sums_backward(p, cache.lse, dstats, cache.mask, cache.shares)
    return (dlogits @ params.w_gate.T).reshape(cache.shape), ExpertChoice(cache.x.T @ dlogits)


def compared(params: ExpertChoice, cache: Cache) -> list[tuple[Array, int]]:
    """The logits (N, E) with k = E, and what the experts compared: for each sequence, p (E, T) with k = c."""
    B, T, _ = cache.shape
    by_sequence = zip(_ranked(cache.probability, cache.mask).reshape(B, T, -1), cache.quota, strict=True)
    return [
        (cache.x @ params.w_gate, params.w_gate.shape[1]),
        *((of_one.T, quota) for of_one, quota in by_sequence if quota),
    ]


def _ranked(probability: Array, mask: Array | None) -> Array:
    """What the experts rank (N, E): padding comes last."""
    return probability if mask is None else array_module(mask).where(mask > 0, probability, -1)
