"""ReMoE: the weight of an expert is its score, or zero if that is negative. The output never jumps; the weights need
not add up to 1.

    z = x W
    w = relu(z)        expert e is awake for token t if z_te > 0, with just this weight

There is no top-k. The weight of an expert approaches zero before the expert falls asleep, so the output of the layer is
continuous. How many experts a token wakes follows from its scores: from none to all of them. A loss of the router's own
keeps the mean near K:

    λ Σ_e f_e mean_t w_te,    f_e = E n_e / (K N),   n_e how many of N tokens wake expert e

A busy expert is more expensive, so the same loss balances the load. After each step λ is changed by a fifth:
λ ← 1.2 λ if fewer than 1 − K/E of all scores (tokens × experts × layers) are zero, λ ← λ/1.2 if more are. λ is one
number for the whole model, and every layer holds the same copy.

In the sums, ``probability`` and ``importance`` are both Σ_t w_t: without a softmax, only the weights say how much a
token prefers an expert. A balance loss is possible (its f adds up to 1), but it is off by default. The z-loss bounds
the normaliser of a softmax; here there is none, so its sum is 0. The entropy is that of a token's weights divided by
their sum.

Wang et al. 2024, arXiv 2412.14711.  Lesson: lessons/21_other_gates.ipynb
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core import tree
from minimoe.core.arrays import Array, array_module, to_host
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.layers import capacity, routing
from minimoe.layers.mode import EVALUATION, Mode
from minimoe.layers.routers import scores
from minimoe.layers.routing import Choice, RouterStats, Routing

VARIES = True
"""A token has as many experts as it wakes, none or all of them."""

BALANCE_LOSS = 0.0
"""No balance loss by default: the router's own loss balances the load."""

FIRST_PENALTY = 1e-8
"""λ at the start: at first, nothing is asked of the router."""

START = 0.5
"""The standard deviation of the scores at the start."""

FACTOR = 1.2
"""What λ is multiplied with, or divided by, after each step."""

LEAST_PENALTY = 1e-30
"""The smallest λ. In float32, a λ below 1e-44 would be rounded to itself when multiplied, and never rise again."""


@tree.marks(state=("penalty",), not_negative=("penalty",), training_only=("penalty",))
class ReMoE(NamedTuple):
    w_gate: Array  # (D, E)
    penalty: Array  # (1,)  λ, the same number in every layer


class Cache(NamedTuple):
    x: Array  # (N, D)
    logits: Array  # (N, E)  z
    chosen: Array  # (N, A)  the A highest scores of each token, A the most experts that any token wakes
    mask: Array | None  # (N, 1)
    shares: Array | None  # (B, E)  of each sequence, if its balance is summed up
    place: Array  # (N, A)  the index of each of a token's entries in the routing; M for a missing one
    shape: tuple[int, ...]  # (B, T, D)


def check(config: ModelConfig) -> None:
    """Allows every config: K is only the number of experts per token that λ aims at."""


def init(rng: np.random.Generator, config: ModelConfig, dtype: DTypeLike = np.float32) -> ReMoE:
    """W drawn from N(0, 1/4D): scores of both signs are equally likely, so about half of the experts are awake.

    The scores of a normalised token are then about 1/2 for any D. If they were much smaller, the first steps could put
    all experts of a small model to sleep long before λ has an effect.
    """
    w_gate = (START / math.sqrt(config.width) * rng.standard_normal((config.width, config.experts))).astype(dtype)
    return ReMoE(w_gate, np.full(1, FIRST_PENALTY, dtype))


def blank(config: ModelConfig, array: Callable[[tuple[int, ...]], Array]) -> ReMoE:
    """The parameters, each made by calling ``array`` with its shape."""
    return ReMoE(array((config.width, config.experts)), array((1,)))


def draw_noise(rng: np.random.Generator, config: ModelConfig, shape: tuple[int, ...], dtype: DTypeLike) -> None:
    """None: this router has no noise."""


def forward(
    params: ReMoE, x: Array, config: ModelConfig, mode: Mode = EVALUATION
) -> tuple[Routing, RouterStats, Cache]:
    """x (B, T, D) → the routing of its N tokens, from 0 to E entries per token, and the sums over them."""
    xp = array_module(x)
    B, _, D = x.shape
    rows = x.reshape(-1, D)
    mask = None if mode.mask is None else mode.mask.reshape(-1, 1).astype(x.dtype)  # (N, 1)

    logits = rows @ params.w_gate  # (N, E)
    weights = xp.maximum(logits, 0)
    awake = (logits > 0).astype(x.dtype)
    # The routing is a table (N, A) with gaps. A is the most experts that any token wakes, so few columns are enough.
    most = int(to_host((awake @ xp.ones((config.experts, 1), x.dtype)).max(0))[0])
    chosen = scores.largest(logits, max(most, 1))  # (N, A)
    largest = xp.take_along_axis(weights, chosen, axis=1)
    kept = largest > 0  # (N, A)
    dropped: Any = 0
    if mode.capacity_factor is not None:
        asked = kept if mask is None else kept & (mask > 0)
        kept = _within_capacity(chosen, asked, B, config, mode)
        dropped = asked.sum() - kept.sum()
    made = routing.from_choice(Choice(chosen, largest), config.experts, kept, dropped)

    shares = scores.shares_by_sequence(awake, B, mask) if mode.balance_by_sequence else None
    return made, _sums(weights, awake, mask, shares), Cache(rows, logits, chosen, mask, shares, made.place, x.shape)


def backward(params: ReMoE, cache: Cache, dweight: Array, dstats: RouterStats | None) -> tuple[Array, ReMoE]:
    """dweight (M,), and the gradient with respect to each sum → dx (B, T, D) and the gradient of W; that of λ is zero.

    w = relu(z), and an expert that is asleep learns nothing from its token:

        dz = 1[z > 0] (dw + dΣw),    dW = xᵀ dz,    dx = dz Wᵀ

    dΣw is the same for every token. It contains λ f / N from the router's own loss, in which f is a count and constant.
    """
    xp = array_module(dweight)
    dlogits = xp.zeros_like(cache.logits)
    xp.put_along_axis(dlogits, cache.chosen, routing.by_token(dweight, cache.place), axis=1)  # 0 for a missing entry
    if dstats is not None:
        dsum = dstats.importance + scores.probability_backward(dstats, cache.shares, len(dlogits))
        dlogits += scores.once_per_token(dsum, cache.mask)
    dlogits *= cache.logits > 0
    dx = dlogits @ params.w_gate.T
    return dx.reshape(cache.shape), ReMoE(cache.x.T @ dlogits, xp.zeros_like(params.penalty))


def regulariser(params: ReMoE, stats: RouterStats, config: ModelConfig) -> tuple[Any, RouterStats]:
    """The sums of a layer → λ Σ_e f_e mean_t w_te, and its gradient λ f_e / N with respect to Σ_t w_te.

    f_e = E n_e / (K N) is 1 for every expert if each wakes for K/E of the tokens.
    """
    xp = array_module(stats.probability)
    tokens = xp.maximum(xp.full((), stats.tokens, stats.probability.dtype), 1)
    price = params.penalty[0] * config.experts / config.active_experts * stats.assignments / (tokens * tokens)  # (E,)
    return (price * stats.probability).sum(), tree.zeros_like(stats._replace(tokens=tokens))._replace(probability=price)


def next_state(
    params: Sequence[ReMoE], stats: Sequence[RouterStats], config: ModelConfig, recipe: TrainConfig
) -> list[ReMoE]:
    """λ after a step, from the share of zeros among the scores of all layers: larger if it is below 1 − K/E.

    All layers count together, so a layer may use more experts than another.
    """
    xp = array_module(params[0].penalty)
    awake = sum(layer.assignments.sum() for layer in stats)
    aim = sum(layer.tokens for layer in stats) * config.active_experts
    # Fewer zeros than 1 − K/E of all scores means more than K experts awake per token.
    step = FACTOR ** xp.sign(awake - aim)
    moved = [xp.maximum(layer.penalty * step, LEAST_PENALTY).astype(layer.penalty.dtype) for layer in params]
    return [layer._replace(penalty=penalty) for layer, penalty in zip(params, moved, strict=True)]


def compared(params: ReMoE, cache: Cache) -> list[tuple[Array, int]]:
    """The logits (N, E), and (N·E, 2) the pair (0, z) of each logit z: an expert is awake if its z is the larger."""
    xp = array_module(cache.logits)
    each = cache.logits.reshape(-1)
    # Zero is the first column, so it wins a tie: an expert with z = 0 sleeps.
    return [(cache.logits, cache.logits.shape[1]), (xp.stack([xp.zeros_like(each), each], axis=1), 1)]


def decode(params: ReMoE, x: Array, config: ModelConfig) -> tuple[list[int], list[float]]:
    """x (D,), one token in evaluation → the experts that it wakes, possibly none, and their weights."""
    logits = to_host(x @ params.w_gate).tolist()
    chosen = [e for e, z in enumerate(logits) if z > 0]
    return chosen, [logits[e] for e in chosen]


def _sums(weights: Array, awake: Array, mask: Array | None, shares: Array | None) -> RouterStats:
    """weights w and awake (N, E) → the sums over the tokens."""
    xp = array_module(weights)
    present = xp.ones(len(weights), weights.dtype) if mask is None else mask[:, 0]  # (N,)
    asked, assignments = present @ weights, present @ awake
    within = xp.zeros((), weights.dtype)
    if shares is not None:
        within = (shares * (weights * present[:, None]).reshape(len(shares), -1, weights.shape[1]).sum(1)).sum()
    # With q = w / Σw, the entropy −Σ q log q is log Σw − Σ w log w / Σw, and 0 log 0 = 0.
    total = weights @ xp.ones(weights.shape[1], weights.dtype)  # (N,)
    total = xp.where(total > 0, total, 1)
    spread = (weights * xp.log(xp.where(awake > 0, weights, 1))).sum(1) / total
    return RouterStats(
        tokens=len(weights) if mask is None else mask.sum(),
        assignments=assignments,
        probability=asked,
        importance=asked,
        load=assignments,
        squared_lse=xp.zeros((), weights.dtype),
        by_sequence=within,
        entropy=present @ (xp.log(total) - spread),
    )


def _within_capacity(chosen: Array, asked: Array, batch: int, config: ModelConfig, mode: Mode) -> Array:
    """Which of the entries that are ``asked`` for (N, A) find a place: a fair share of a sequence is K·T/E entries."""
    xp = array_module(chosen)
    assert mode.capacity_factor is not None
    factor, K, E = mode.capacity_factor, config.active_experts, config.experts
    if mode.mask is None:
        limit = math.ceil(factor * K * (len(chosen) // batch) / E)
    else:
        limit = xp.ceil(factor * K * mode.mask.sum(1, keepdims=True) / E)  # (B, 1)
    entries, real = chosen.reshape(batch, -1), asked.reshape(batch, -1)  # (B, T·A)
    return capacity.within_capacity(entries, E, limit, real).reshape(asked.shape)
