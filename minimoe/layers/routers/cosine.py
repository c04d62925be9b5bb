"""The cosine router: an expert is chosen by the angle between its vector and the token, not by the token's length.

    u = x P + b                       the token, projected to a few numbers
    z = s û·m̂_e,  û = u/‖u‖           s times the cosine of the angle between u and the expert's vector m_e
    s = exp(min(τ, ln 100))           a learned scale, which starts at 2 and is at most 100
    S = the K largest of z            the lowest index wins a tie
    w = softmax(z_S)                  over the chosen, as in Mixtral

There are two published forms, and ``cosine_form`` chooses between them:

    tutel     u has 256 numbers and a bias; m starts at N(0, 0.01²)
    x-moe     u has 16 numbers and no bias; the vectors m start at right angles to each other

In a small model, u is narrower: at most half as wide as the token, so that the cosine is still computed in few
dimensions. Without the bias, x and 3x have the same z. With it, they differ, because only the length of u is lost, and
u is no longer proportional to x.

Chi et al. 2022, arXiv 2204.09179 (X-MoE); Tutel's ``cosine_top`` (the bias, the scale and its limit).
Lesson: lessons/21_other_gates.ipynb
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core.arrays import Array, array_module, to_host
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import capacity, routing
from minimoe.layers.mode import EVALUATION, Mode
from minimoe.layers.routers import scores
from minimoe.layers.routing import Choice, RouterStats, Routing

WIDEST = {"tutel": 256, "x-moe": 16}
"""W, the width of u, in each form; a model of width D has at most D/2."""

EXPERT_STD = 0.01
"""The standard deviation of the experts' vectors at the start in Tutel's form."""

START, LARGEST = math.log(2), math.log(100)
"""τ at the start, and where it is cut."""


class Cosine(NamedTuple):
    projection: Array  # (D, W)  P
    bias: Array | None  # (W,)  b, in Tutel's form
    directions: Array  # (E, W)  m; only their directions count
    temperature: Array  # (1,)  τ


class Cache(NamedTuple):
    x: Array  # (N, D)
    token: Array  # (N, W)  û
    token_norm: Array  # (N, 1)  ‖u‖
    expert: Array  # (E, W)  m̂
    expert_norm: Array  # (E, 1)  ‖m‖
    scale: Array  # (1,)  s
    logits: Array  # (N, E)  z
    probability: Array  # (N, E)  softmax(z)
    lse: Array  # (N, 1)
    chosen: Array  # (N, K)
    weights: Array  # (N, K)
    mask: Array | None  # (N, 1)
    shares: Array | None  # (B, E)  of each sequence, if its balance is summed up
    place: Array  # (N, K)  the index of each of a token's entries in the routing
    shape: tuple[int, ...]  # (B, T, D)


def check(config: ModelConfig) -> None:
    """Raises ``UserError`` for one expert per token, whose weight would always be 1."""
    if config.active_experts == 1 and config.experts > 1:
        raise UserError(
            "active_experts 1 gives every chosen expert of the router 'cosine' the constant weight 1, so the router "
            "gets no gradient from the language-model loss: set active_experts to 2 or more, or choose the router "
            "'switch'."
        )


def check_forward(config: ModelConfig) -> None:
    """Allows every config: a model with one expert of weight 1 cannot be trained, but it can be run."""


def width_of(config: ModelConfig) -> int:
    """W, the width of the projected token: the width that the form has, or D/2 if D/2 is less."""
    return min(WIDEST[config.cosine_form], max(config.width // 2, 1))


def init(rng: np.random.Generator, config: ModelConfig, dtype: DTypeLike = np.float32) -> Cosine:
    """P and b uniform in ±1/√D, as in the published code; τ = ln 2; the experts' vectors as the form says.

    In the form "x-moe" the vectors are orthonormal if E ≤ W. If E > W this is impossible, and the W columns of
    their matrix are orthonormal instead.
    """
    D, E, W = config.width, config.experts, width_of(config)
    bound = D**-0.5
    projection = rng.uniform(-bound, bound, (D, W))
    if config.cosine_form == "tutel":
        bias = rng.uniform(-bound, bound, W).astype(dtype)
        directions = EXPERT_STD * rng.standard_normal((E, W))
    else:
        bias = None
        tall = np.linalg.qr(rng.standard_normal((max(E, W), min(E, W))))[0]  # orthonormal columns
        directions = tall if E > W else tall.T
    return Cosine(projection.astype(dtype), bias, directions.astype(dtype), np.full(1, START, dtype))


def blank(config: ModelConfig, array: Callable[[tuple[int, ...]], Array]) -> Cosine:
    """The parameters, each made by calling ``array`` with its shape."""
    W = width_of(config)
    bias = array((W,)) if config.cosine_form == "tutel" else None
    return Cosine(array((config.width, W)), bias, array((config.experts, W)), array((1,)))


def draw_noise(rng: np.random.Generator, config: ModelConfig, shape: tuple[int, ...], dtype: DTypeLike) -> None:
    """None: this router has no noise."""


def forward(
    params: Cosine, x: Array, config: ModelConfig, mode: Mode = EVALUATION
) -> tuple[Routing, RouterStats, Cache]:
    """x (B, T, D) → the routing of its N tokens, K entries per token, and the sums over them."""
    xp = array_module(x)
    B, _, D = x.shape
    rows = x.reshape(-1, D)
    mask = None if mode.mask is None else mode.mask.reshape(-1, 1).astype(x.dtype)  # (N, 1)

    token, token_norm = _normalised(_projected(params, rows))
    expert, expert_norm = _normalised(params.directions)
    scale = _scale(params.temperature)
    logits = scale * (token @ expert.T)  # (N, E)  z
    probability, lse = scores.softmax(logits)
    chosen = scores.largest(logits, config.active_experts)
    weights = scores.softmax(xp.take_along_axis(logits, chosen, axis=1))[0]
    made = capacity.limit(Choice(chosen, weights), B, config.experts, mode.capacity_factor, mode.mask)

    one_hot, gated = xp.zeros((2, *logits.shape), x.dtype)
    xp.put_along_axis(one_hot, chosen, 1, axis=1)
    xp.put_along_axis(gated, chosen, weights, axis=1)
    shares = scores.shares_by_sequence(one_hot, B, mask) if mode.balance_by_sequence else None
    stats = scores.sums(logits, probability, lse, one_hot, gated, one_hot, mask, shares)
    cache = Cache(
        rows, token, token_norm, expert, expert_norm, scale, logits, probability, lse, chosen, weights, mask, shares,
        made.place, x.shape,
    )  # fmt: skip
    return made, stats, cache


def backward(params: Cosine, cache: Cache, dweight: Array, dstats: RouterStats | None) -> tuple[Array, Cosine]:
    """dweight (M,), and the gradient with respect to each sum → dx (B, T, D) and the gradient of every parameter.

    From z = s û·m̂ both directions and the scale get a gradient. A longer u does not change û, so du ⟂ u:

        dz_S = w ⊙ (dw − Σ w dw), and the losses reach every z through its softmax
        dû = s dz m̂,    du = (dû − û (û·dû)) / ‖u‖,    and the same for m
        dτ = 1[τ < ln 100] Σ dz ⊙ z
        dP = xᵀ du,  db = Σ_t du,  dx = du Pᵀ
    """
    xp = array_module(dweight)
    dweights = routing.by_token(dweight, cache.place)  # (N, K)
    if dstats is not None:  # the importance is the sum of all weights, those of refused entries included
        dweights = dweights + scores.once_per_token(dstats.importance[cache.chosen], cache.mask)
    along = (cache.weights * dweights).sum(1, keepdims=True)
    dlogits = xp.zeros_like(cache.logits)
    xp.put_along_axis(dlogits, cache.chosen, cache.weights * (dweights - along), axis=1)
    if dstats is not None:
        dlogits += scores.sums_backward(cache.probability, cache.lse, dstats, cache.mask, cache.shares)

    du = _normalised_backward(cache.token, cache.token_norm, cache.scale * (dlogits @ cache.expert))
    dm = _normalised_backward(cache.expert, cache.expert_norm, cache.scale * (dlogits.T @ cache.token))
    # Above the cut the scale is constant. s = exp τ, so ds/dτ = s, and s times the cosine is z itself.
    dtemperature = (params.temperature < LARGEST) * (dlogits * cache.logits).sum()
    dbias = None if params.bias is None else du.sum(0)
    dx = du @ params.projection.T
    grads = Cosine(cache.x.T @ du, dbias, dm, dtemperature.astype(cache.x.dtype))
    return dx.reshape(cache.shape), grads


def compared(params: Cosine, cache: Cache) -> list[tuple[Array, int]]:
    """What top-k compared: the logits (N, E)."""
    return [(cache.logits, cache.chosen.shape[1])]


def decode(params: Cosine, x: Array, config: ModelConfig) -> tuple[list[int], list[float]]:
    """x (D,), one token in evaluation → its K experts and their weights."""
    token, expert = _normalised(_projected(params, x[None]))[0], _normalised(params.directions)[0]
    logits = to_host(_scale(params.temperature) * (token @ expert.T))[0].tolist()
    # sorted is stable, so the lowest index wins a tie, as in forward.
    chosen = sorted(range(len(logits)), key=lambda e: -logits[e])[: config.active_experts]
    exp = [math.exp(logits[e] - logits[chosen[0]]) for e in chosen]
    return chosen, [one / sum(exp) for one in exp]


def _projected(params: Cosine, rows: Array) -> Array:
    """rows (N, D) → u (N, W)."""
    u = rows @ params.projection
    return u if params.bias is None else u + params.bias


def _scale(temperature: Array) -> Array:
    """τ (1,) → s (1,)."""
    xp = array_module(temperature)
    scale: Array = xp.exp(xp.minimum(temperature, LARGEST))
    return scale


def _normalised(v: Array) -> tuple[Array, Array]:
    """v (·, W) → its rows divided by their norms, and the norms (·, 1).

    A row of zeros has no direction. It stays zero: its cosine with everything is 0, and ``_normalised_backward`` passes
    no gradient to it, because there the slope has no limit.
    """
    xp = array_module(v)
    norm = xp.sqrt((v * v).sum(1, keepdims=True))
    return v / xp.where(norm > 0, norm, 1), norm


def _normalised_backward(unit: Array, norm: Array, dunit: Array) -> Array:
    """The gradient with respect to the normalised rows (·, W) → with respect to the rows before."""
    xp = array_module(unit)
    across = dunit - unit * (unit * dunit).sum(1, keepdims=True)  # the part along the row is lost
    return across * ((norm > 0) / xp.where(norm > 0, norm, 1)).astype(unit.dtype)
