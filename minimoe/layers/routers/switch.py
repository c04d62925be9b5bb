"""The Switch router: each token goes to one expert, weighted by the probability that its router gives to that expert.

    p = softmax(x̃ W),    x̃ = x ⊙ ξ,   ξ ~ U(1 − 0.01, 1 + 0.01), only in training
    e = argmax p          the lowest index wins a tie
    w = p_e               raw, not renormalised: through it the router learns from the language-model loss

In training an expert accepts at most 1.25 times its fair share of a sequence, unless the recipe sets another capacity
factor. A refused token skips the layer; the residual stream carries it past. In evaluation no token is refused.

Fedus et al. 2021, arXiv 2101.03961 (the weight, the capacity, and jitter on the input of the router).
Lesson: lessons/20_switch_and_gshard.ipynb
"""

from __future__ import annotations

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

JITTER = 0.01
"""The largest distance of ξ from 1."""

CAPACITY_FACTOR = 1.25
"""The capacity factor of training if the recipe sets none."""


class Switch(NamedTuple):
    w_gate: Array  # (D, E)


class Cache(NamedTuple):
    x: Array  # (N, D)  with jitter
    jitter: Array | None  # (N, D)  ξ
    probability: Array  # (N, E)
    lse: Array  # (N, 1)
    chosen: Array  # (N, 1)
    mask: Array | None  # (N, 1)
    shares: Array | None  # (B, E)  of each sequence, if its balance is summed up
    place: Array  # (N, 1)  the index of each token's entry in the routing
    shape: tuple[int, ...]  # (B, T, D)


def check(config: ModelConfig) -> None:
    """Raises ``UserError`` unless ``config`` sends each token to one expert."""
    if config.active_experts != 1:
        raise UserError(
            f"active_experts {config.active_experts} is not possible with the router 'switch', which sends each token "
            "to one expert: set active_experts to 1."
        )


def init(rng: np.random.Generator, config: ModelConfig, dtype: DTypeLike = np.float32) -> Switch:
    """W drawn from N(0, 0.02²), so that the first probabilities are nearly equal."""
    return Switch((0.02 * rng.standard_normal((config.width, config.experts))).astype(dtype))


def blank(config: ModelConfig, array: Callable[[tuple[int, ...]], Array]) -> Switch:
    """The parameters, each made by calling ``array`` with its shape."""
    return Switch(array((config.width, config.experts)))


def draw_noise(rng: np.random.Generator, config: ModelConfig, shape: tuple[int, ...], dtype: DTypeLike) -> Array | None:
    """ξ for tokens of a ``shape`` such as (L, B, T): uniform around 1, (L, B, T, D), or None without noisy gating."""
    if not config.noisy_gating:
        return None
    return rng.uniform(1 - JITTER, 1 + JITTER, (*shape, config.width)).astype(dtype)


def forward(
    params: Switch, x: Array, config: ModelConfig, mode: Mode = EVALUATION
) -> tuple[Routing, RouterStats, Cache]:
    """x (B, T, D) → the routing of its N tokens, at most one entry per token, and the sums over them."""
    xp = array_module(x)
    B, _, D = x.shape
    rows = x.reshape(-1, D)
    jitter = None if mode.noise is None else mode.noise.reshape(-1, D)
    mask = None if mode.mask is None else mode.mask.reshape(-1, 1).astype(x.dtype)  # (N, 1)
    rows = rows if jitter is None else rows * jitter

    logits = rows @ params.w_gate  # (N, E)
    probability, lse = scores.softmax(logits)
    chosen = scores.largest(logits, 1)
    weights = xp.take_along_axis(probability, chosen, axis=1)

    factor = CAPACITY_FACTOR if mode.training and mode.capacity_factor is None else mode.capacity_factor
    made = capacity.limit(Choice(chosen, weights), B, config.experts, factor, mode.mask)

    one_hot = xp.zeros_like(probability)
    xp.put_along_axis(one_hot, chosen, 1, axis=1)
    shares = scores.shares_by_sequence(one_hot, B, mask) if mode.balance_by_sequence else None
    stats = scores.sums(logits, probability, lse, one_hot, one_hot * probability, one_hot, mask, shares)
    return made, stats, Cache(rows, jitter, probability, lse, chosen, mask, shares, made.place, x.shape)


def backward(params: Switch, cache: Cache, dweight: Array, dstats: RouterStats | None) -> tuple[Array, Switch]:
    """dweight (M,), and the gradient with respect to each sum → dx (B, T, D) and the gradient of W.

    The weight is one probability of a full softmax, so every logit of a token gets a gradient:

        dz = p ⊙ (1_e dw − p_e dw),    dx = (dz Wᵀ) ⊙ ξ

    The load is a count here and has no gradient. The losses reach the logits through Σp, Σw and Σ lse².
    """
    xp = array_module(dweight)
    p = cache.probability
    dweights = routing.by_token(dweight, cache.place)  # (N, 1), zero for a refused token
    if dstats is not None:  # the importance is the sum of all weights, those of refused tokens included
        dweights = dweights + scores.once_per_token(dstats.importance[cache.chosen], cache.mask)
    dlogits = -p * (xp.take_along_axis(p, cache.chosen, axis=1) * dweights)
    dlogits[xp.arange(len(p)), cache.chosen[:, 0]] += (xp.take_along_axis(p, cache.chosen, axis=1) * dweights)[:, 0]
    if dstats is not None:
        dlogits += scores.sums_backward(p, cache.lse, dstats, cache.mask, cache.shares)
    dx = dlogits @ params.w_gate.T
    if cache.jitter is not None:
        dx *= cache.jitter
    return dx.reshape(cache.shape), Switch(cache.x.T @ dlogits)


def compared(params: Switch, cache: Cache) -> list[tuple[Array, int]]:
    """What argmax compared: the logits (N, E)."""
    return [(cache.x @ params.w_gate, 1)]


def decode(params: Switch, x: Array, config: ModelConfig) -> tuple[list[int], list[float]]:
    """x (D,), one token in evaluation → its expert and that expert's weight."""
    p = to_host(scores.softmax((x @ params.w_gate)[None])[0])[0]
    expert = int(p.argmax())
    return [expert], [float(p[expert])]
