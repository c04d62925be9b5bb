"""Expert threshold: the causal form of expert choice. Each expert takes the tokens whose p exceeds its threshold.

    p = softmax(x W)                       over the experts
    expert e takes token t if p_te > τ_e   τ (E,) is fixed during a step, in evaluation and in generation
    w = p_te                               raw, not renormalised

In expert choice, the p of the last token that an expert takes is a threshold too, but one that depends on the whole
sequence. Here the threshold is remembered from earlier steps, so a token is compared with a number that no other token
of its sequence can change. In return, the load is fair only on average: a token gets every expert whose threshold it
exceeds, from none to all E, and an expert gets K·T/E tokens of a sequence on average.

After each step, a threshold moves by the expert's load relative to its fair share:

    τ_e ← τ_e · exp(η (load_e / fair − 1)),    load_e = the tokens taken,  fair = K N / E,  η = 0.05

The threshold stops moving where the expert takes a share K/E of all tokens, that is, at the same quantile of p_e as the
smallest p that expert choice takes. Sun et al. 2026 keep an exponential moving average of a threshold that is estimated
from all tokens together. Such an estimate is a quantile of the batch, which cannot be computed from each shard
separately. The load is a sum over tokens, so any division of the batch into shards or workers gives the same
thresholds.

Zhou et al. 2022, arXiv 2202.09368 (expert choice); Sun et al. 2026, arXiv 2603.11535 (thresholds).
Lesson: lessons/23_who_may_look_ahead.ipynb
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core import tree
from minimoe.core.arrays import Array, array_module, to_host
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.layers import routing
from minimoe.layers.mode import EVALUATION, Mode
from minimoe.layers.routers import scores
from minimoe.layers.routing import RouterStats, Routing

RATE = 0.05
"""η: how far a threshold moves after a step, relative to itself and to the expert's surplus of load."""

VARIES = True
"""A token gets as many experts as it is good enough for."""

BALANCE_LOSS = 0.0
"""The thresholds balance the load, so no loss has to."""


@tree.marks(state=("threshold",), not_negative=("threshold",))
class ExpertThreshold(NamedTuple):
    w_gate: Array  # (D, E)
    threshold: Array  # (E,)  τ


class Cache(NamedTuple):
    x: Array  # (N, D)
    probability: Array  # (N, E)
    lse: Array  # (N, 1)
    taken: Array  # (N, E)  bool: before the capacity
    experts: Array  # (N, ·)  the experts of each token, best first
    place: Array  # (N, ·)  the index of each of a token's entries in the routing
    mask: Array | None  # (N, 1)
    shares: Array | None  # (B, E)  of each sequence, if its balance is summed up
    shape: tuple[int, ...]  # (B, T, D)


def check(config: ModelConfig) -> None:
    """Every number of experts works."""


def init(rng: np.random.Generator, config: ModelConfig, dtype: DTypeLike = np.float32) -> ExpertThreshold:
    """W drawn from N(0, 0.02²), and thresholds at which a fresh expert takes about a share K/E of the tokens.

    The input of the layer is normalised, so a fresh logit z is nearly N(0, s²) with s = 0.02 √D, and p is nearly exp(z)
    / (E exp(s²/2)). If K = E, the threshold is 0: every expert takes every token.
    """
    D, E, K = config.width, config.experts, config.active_experts
    w_gate = (0.02 * rng.standard_normal((D, E))).astype(dtype)
    s = 0.02 * math.sqrt(D)
    tau = math.exp(s * NormalDist().inv_cdf(1 - K / E) - s * s / 2) / E if K < E else 0.0
    return ExpertThreshold(w_gate, np.full(E, tau, dtype))


def blank(config: ModelConfig, array: Callable[[tuple[int, ...]], Array]) -> ExpertThreshold:
    """The parameters, each made by calling ``array`` with its shape."""
    return ExpertThreshold(array((config.width, config.experts)), array((config.experts,)))


def draw_noise(rng: np.random.Generator, config: ModelConfig, shape: tuple[int, ...], dtype: DTypeLike) -> None:
    """None: the router needs no noise, since an idle expert lowers its threshold until it gets tokens."""


def forward(
    params: ExpertThreshold, x: Array, config: ModelConfig, mode: Mode = EVALUATION
) -> tuple[Routing, RouterStats, Cache]:
    """x (B, T, D) → the routing of its N tokens, none to E entries per token, and the sums over them.

    Only a capacity factor causes drops; its fair share is K·T/E. Padding is sent to no expert.
    """
    B, T, D = x.shape
    rows = x.reshape(-1, D)
    mask = None if mode.mask is None else mode.mask.reshape(-1, 1).astype(x.dtype)  # (N, 1)

    logits = rows @ params.w_gate  # (N, E)
    probability, lse = scores.softmax(logits)
    taken = probability > params.threshold
    taken = taken if mask is None else taken & (mask > 0)
    kept = taken
    if mode.capacity_factor is not None:
        kept = _seated(taken.reshape(B, T, -1), config, mode.capacity_factor, mode.mask).reshape(B * T, -1)
    choice, exists = scores.choice_of(kept, probability)
    dropped = 0 if kept is taken else taken.sum() - kept.sum()
    made = routing.from_choice(choice, config.experts, exists, dropped)

    chosen = taken.astype(x.dtype)
    shares = scores.shares_by_sequence(chosen, B, mask) if mode.balance_by_sequence else None
    stats = scores.sums(logits, probability, lse, chosen, chosen * probability, chosen, mask, shares)
    return made, stats, Cache(rows, probability, lse, taken, choice.experts, made.place, mask, shares, x.shape)


def backward(
    params: ExpertThreshold, cache: Cache, dweight: Array, dstats: RouterStats | None
) -> tuple[Array, ExpertThreshold]:
    """dweight (M,), and the gradient with respect to each sum → dx (B, T, D), the gradient of W, and zeros for τ.

    Each weight is one entry of p, a full softmax of its token, so the logits of experts that do not take the token get
    a gradient too. Crossing the threshold is a jump, which has no slope:

        dp = 1[taken] ⊙ dw,    dz = p ⊙ (dp − Σ_e p dp)
    """
    xp = array_module(dweight)
    p = cache.probability
    dp = xp.zeros_like(p)
    xp.put_along_axis(dp, cache.experts, routing.by_token(dweight, cache.place), axis=1)
    if dstats is not None:  # the importance is the sum of all weights, those of refused entries included
        dp += cache.taken * dstats.importance
    dlogits = p * (dp - (p * dp).sum(1, keepdims=True))
    if dstats is not None:
        dlogits += scores.sums_backward(p, cache.lse, dstats, cache.mask, cache.shares)
    dx = (dlogits @ params.w_gate.T).reshape(cache.shape)
    return dx, ExpertThreshold(cache.x.T @ dlogits, xp.zeros_like(params.threshold))


def next_state(
    params: Sequence[ExpertThreshold], stats: Sequence[RouterStats], config: ModelConfig, recipe: TrainConfig
) -> list[ExpertThreshold]:
    """Thresholds rise where an expert took more than its fair share of the step's tokens, and fall where it took less.

    ``assignments`` counts what the thresholds let through, whether or not a capacity then refused the token.
    """
    return [
        layer._replace(threshold=moved(layer.threshold, sums.assignments, sums.tokens, config.active_experts))
        for layer, sums in zip(params, stats, strict=True)
    ]


def moved(threshold: Array, load: Array, tokens: Array | int, active: int) -> Array:
    """The thresholds (E,) after a step of N = ``tokens``, in which the experts took ``load`` (E,) tokens.

    A factor makes the size of a step independent of the size of τ, and keeps τ positive. The logarithm of τ moves by
    η (E/K − 1) for an expert that took every token, and by −η for one that took none. Without tokens, nothing moves.
    """
    xp = array_module(threshold)
    fair = xp.full((), tokens, threshold.dtype) * (active / len(threshold))
    surplus = (load - fair) / xp.maximum(fair, 1e-9)
    return threshold * xp.exp(RATE * surplus).astype(threshold.dtype)


def compared(params: ExpertThreshold, cache: Cache) -> list[tuple[Array, int]]:
    """The logits (N, E) with k = E, and each probability beside its expert's threshold, (N·E, 2), with k = 1."""
    xp = array_module(params.threshold)
    p = cache.probability
    beside = xp.stack([p, xp.broadcast_to(params.threshold, p.shape)], axis=2).reshape(-1, 2)
    return [(cache.x @ params.w_gate, p.shape[1]), (beside, 1)]


def decode(params: ExpertThreshold, x: Array, config: ModelConfig) -> tuple[list[int], list[float]]:
    """x (D,), one token in evaluation → its experts, best first, and their weights; both lists may be empty."""
    p = to_host(scores.softmax((x @ params.w_gate)[None])[0])[0]
    taken = np.flatnonzero(p > to_host(params.threshold))
    taken = taken[np.argsort(-p[taken], kind="stable")]
    return taken.tolist(), p[taken].tolist()


def _seated(taken: Array, config: ModelConfig, factor: float, mask: Array | None) -> Array:
    """taken (B, T, E) → those within the capacity of their expert in their sequence: first come, first served."""
    xp = array_module(taken)
    B, T, E = taken.shape
    real = xp.full((B, 1, 1), T) if mask is None else mask.sum(1)[:, None, None]
    return taken & (xp.cumsum(taken, axis=1) <= xp.ceil(factor * config.active_experts * real / E))
