"""Noisy top-k gating: each token goes to the K experts with the highest scores, and learned noise explores the others.

    c = x W_gate                     clean logits
    h = c + ξ ⊙ σ,                   σ = softplus(x W_noise) + 0.01,   ξ ~ N(0, 1), only in training
    S = the K largest of h           the lowest index wins a tie
    w = softmax(h_S)                 Mixtral's order: choose, then normalise over the chosen
    w = softmax(h)_S                 without ``renormalize``: unchosen logits count too

The noise does more than explore. Through σ the router learns *how much* to explore for each token, and the noise makes
the probability of being chosen a smooth function, which the load loss needs:

    P(t, i) = Φ((c_ti − τ_ti) / σ_ti),    τ_ti = the K-th largest of h_t without i

``gate`` and ``gate_backward`` hold the mathematics; ``forward`` and ``backward`` connect them to the mixture-of-experts
layer. The plain form is in ``minimoe/reference.py``.

Shazeer et al. 2017, arXiv 1701.06538; Jiang et al. 2024, arXiv 2401.04088; Fedus et al. 2021, arXiv 2101.03961.
Lesson: lessons/07_noisy_top_k_gating.ipynb
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core import gaussian, tree
from minimoe.core.arrays import Array, array_module, to_host, underflow_is_right
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import capacity, routing
from minimoe.layers.mode import EVALUATION, Mode
from minimoe.layers.routers import scores
from minimoe.layers.routing import Choice, RouterStats, Routing

NOISE_FLOOR = 0.01
"""Added to every noise scale σ, as in the authors' code, so that there is no division by zero."""


@tree.marks(training_only=("w_noise",))
class Router(NamedTuple):
    w_gate: Array  # (D, E)
    w_noise: Array | None  # (D, E), or None for plain top-k


class LoadCache(NamedTuple):
    """What the backward pass needs from the estimate of the probability of being chosen."""

    z: Array  # (N, E)  (c − τ) / σ
    chosen: Array  # (N, E)  bool
    last_in: Array  # (N,)    the K-th expert
    first_out: Array  # (N,)    the (K+1)-th expert


class GateCache(NamedTuple):
    x: Array  # (N, D)
    probability: Array  # (N, E)  softmax(c)
    lse: Array  # (N, 1)
    ranking: Array  # (N, K or K+1)  experts, best first: the chosen ones, and the next one if there is any
    gate: Array  # (N, K) the weights, or (N, E) softmax(h) if not renormalised
    noise: Array | None  # (N, E)  ξ
    noise_logits: Array | None  # (N, E)  x W_noise
    sigma: Array | None  # (N, E)
    load: LoadCache | None
    mask: Array | None  # (N, 1)
    renormalize: bool
    shares: Array | None  # (B, E)  of each sequence, if its balance is summed up


class Cache(NamedTuple):
    gate: GateCache
    place: Array  # (N, K)  the index of each of a token's entries in the routing
    top_k: int
    shape: tuple[int, ...]  # (B, T, D)


def check(config: ModelConfig) -> None:
    """Raises ``UserError`` for one expert per token whose weight is always 1: the router would get no gradient."""
    if config.active_experts == 1 and config.experts > 1 and config.renormalize:
        raise UserError(
            "active_experts 1 with renormalize on gives every chosen expert the constant weight 1, so the router gets "
            "no gradient from the language-model loss: set renormalize to false (--no-renormalize), set active_experts "
            "to 2 or more, or choose the router 'switch'."
        )


def check_forward(config: ModelConfig) -> None:
    """Allows every config: one expert of weight 1 cannot be trained, but published models of this kind can be run."""


def init(rng: np.random.Generator, config: ModelConfig, dtype: DTypeLike = np.float32, std: float = 0.02) -> Router:
    """W_gate drawn from N(0, std²), W_noise zero, so that every σ starts at softplus(0) + 0.01 ≈ 0.70."""
    shape = (config.width, config.experts)
    w_gate = (std * rng.standard_normal(shape)).astype(dtype)
    return Router(w_gate, np.zeros(shape, dtype) if config.noisy_gating else None)


def blank(config: ModelConfig, array: Callable[[tuple[int, ...]], Array]) -> Router:
    """The parameters, each made by calling ``array`` with its shape."""
    shape = (config.width, config.experts)
    return Router(array(shape), array(shape) if config.noisy_gating else None)


def draw_noise(rng: np.random.Generator, config: ModelConfig, shape: tuple[int, ...], dtype: DTypeLike) -> Array | None:
    """ξ for tokens of a ``shape`` such as (L, B, T): standard normal (L, B, T, E), or None without noisy gating."""
    if not config.noisy_gating:
        return None
    kind: Any = np.dtype(dtype).type
    noise: Array = rng.standard_normal((*shape, config.experts), kind)
    return noise


def forward(
    params: Router, x: Array, config: ModelConfig, mode: Mode = EVALUATION
) -> tuple[Routing, RouterStats, Cache]:
    """x (B, T, D) → the routing of its N tokens and the sums over them. Only a capacity factor causes drops."""
    B, T, D = x.shape
    choice, stats, gate_cache = gate(
        params,
        x.reshape(-1, D),
        config.active_experts,
        renormalize=config.renormalize,
        noise=None if mode.noise is None else mode.noise.reshape(B * T, -1),
        estimate_load=mode.estimate_load,
        mask=mode.mask,
        sequences=B if mode.balance_by_sequence else None,
    )
    made = capacity.limit(choice, B, config.experts, mode.capacity_factor, mode.mask)
    return made, stats, Cache(gate_cache, made.place, config.active_experts, x.shape)


def backward(params: Router, cache: Cache, dweight: Array, dstats: RouterStats | None) -> tuple[Array, Router]:
    """dweight (M,), and the gradient with respect to each sum → dx (B, T, D) and the gradients of W_gate, W_noise."""
    dx, grads = gate_backward(params, cache.gate, routing.by_token(dweight, cache.place), dstats)
    return dx.reshape(cache.shape), grads


def compared(params: Router, cache: Cache) -> list[tuple[Array, int]]:
    """What top-k compared: the logits with their noise (N, E)."""
    of = cache.gate
    clean = of.x @ params.w_gate
    return [(clean if of.noise is None or of.sigma is None else clean + of.noise * of.sigma, cache.top_k)]


def decode(params: Router, x: Array, config: ModelConfig) -> tuple[list[int], list[float]]:
    """x (D,), one token in evaluation → its K experts and their weights.

    This is a faster form of ``gate``: for so few numbers, plain Python is fastest.
    """
    logits = to_host(x.dot(params.w_gate)).tolist()
    # sorted is stable, so the lowest index wins a tie, as in the gate.
    chosen = sorted(range(len(logits)), key=logits.__getitem__, reverse=True)[: config.active_experts]
    largest = logits[chosen[0]]
    exp = [math.exp(logits[e] - largest) for e in chosen]
    total = sum(exp) if config.renormalize else sum([math.exp(z - largest) for z in logits])
    return chosen, [z / total for z in exp]


def mixtral_tensors(params: Router) -> list[tuple[str, Array]]:
    """The names of the parameters within a layer of Mixtral's layout, each with a view in the shape used there.

    W_noise is left out, because that layout has no noise.
    """
    return [("block_sparse_moe.gate.weight", params.w_gate.T)]


@underflow_is_right
def gate(
    params: Router,
    x: Array,
    top_k: int,
    *,
    renormalize: bool = True,
    noise: Array | None = None,
    estimate_load: bool = True,
    mask: Array | None = None,
    sequences: int | None = None,
) -> tuple[Choice, RouterStats, GateCache]:
    """x (N, D) → the choice of each of its N tokens and the sums over them.

    ``noise`` (N, E) is ξ, drawn from N(0, 1) by the caller. Without it, or without W_noise, the clean logits decide.
    ``mask`` (N,) of 0 and 1 leaves padding out of the sums. ``estimate_load=False`` skips the estimate of P(t, i), for
    when no loss uses it. ``sequences``, the number of sequences in x, is given when a loss uses the balance of each
    sequence.
    """
    xp = array_module(x)
    experts = params.w_gate.shape[1]
    mask = None if mask is None else mask.reshape(-1, 1).astype(x.dtype)  # (N, 1)

    clean = x @ params.w_gate  # (N, E)  c
    probability, lse = scores.softmax(clean)
    noise_logits = sigma = None
    noisy = clean  # h
    if noise is not None and params.w_noise is not None:
        noise_logits = x @ params.w_noise
        sigma = _softplus(noise_logits) + NOISE_FLOOR
        noisy = clean + noise * sigma
    else:
        noise = None

    # One expert more than the chosen ones: its logit is the threshold τ that a chosen expert must stay above.
    ranking = scores.largest(noisy, min(top_k + 1, experts))
    chosen = ranking[:, :top_k]
    if renormalize:
        weights = gate = scores.softmax(xp.take_along_axis(noisy, chosen, axis=1))[0]
    else:
        gate = probability if noisy is clean else scores.softmax(noisy)[0]
        weights = xp.take_along_axis(gate, chosen, axis=1)

    one_hot = xp.zeros((len(x), experts), x.dtype)
    xp.put_along_axis(one_hot, chosen, 1, axis=1)
    gated = xp.zeros_like(one_hot)
    xp.put_along_axis(gated, chosen, weights, axis=1)
    counted = one_hot  # the load, if it is not estimated
    load_cache = None
    if sigma is not None and estimate_load and top_k < experts:
        counted, load_cache = _probability_of_being_chosen(clean, noisy, sigma, ranking, one_hot > 0)

    shares = None if sequences is None else scores.shares_by_sequence(one_hot, sequences, mask)
    stats = scores.sums(clean, probability, lse, one_hot, gated, counted, mask, shares)
    cache = GateCache(
        x, probability, lse, ranking, gate, noise, noise_logits, sigma, load_cache, mask, renormalize, shares
    )
    return Choice(chosen, weights), stats, cache


@underflow_is_right
def gate_backward(
    params: Router, cache: GateCache, dweights: Array, dstats: RouterStats | None
) -> tuple[Array, Router]:
    """dweights (N, K), and the gradient with respect to each sum → dx (N, D) and the gradients of W_gate, W_noise.

    Four paths lead back to the logits; the third is easily forgotten:

        weights      renormalised: dh_S = w ⊙ (dw − Σ w dw); otherwise dh = p ⊙ (1_S dw − Σ_S p dw), p = softmax(h)
        load         q = dP φ(z)/σ:  dc += q,  dσ −= q z
        threshold    τ is itself a logit: dh_τ −= q, at the (K+1)-th for the chosen, at the K-th for the others
        clean logits dc += p ⊙ (u − Σ p u) from Σp,  dc += 2 lse · p from Σ lse²,  p = softmax(c)

    Then h = c + ξ ⊙ σ gives dc += dh, dσ += dh ⊙ ξ, and σ = softplus(r) + 0.01 gives dr = dσ ⊙ sigmoid(r), where
    r = x W_noise.
    """
    xp = array_module(dweights)
    probability, noise, sigma, load = cache.probability, cache.noise, cache.sigma, cache.load
    chosen = cache.ranking[:, : dweights.shape[1]]

    # 1  The weights. The importance is a sum of weights, so its gradient is added to theirs.
    if dstats is not None:
        dweights = dweights + scores.once_per_token(dstats.importance[chosen], cache.mask)
    dnoisy = xp.zeros_like(probability)  # dh
    if cache.renormalize:
        along = (cache.gate * dweights).sum(1, keepdims=True)
        xp.put_along_axis(dnoisy, chosen, cache.gate * (dweights - along), axis=1)
    else:
        xp.put_along_axis(dnoisy, chosen, dweights, axis=1)
        dnoisy -= (cache.gate * dnoisy).sum(1, keepdims=True)
        dnoisy *= cache.gate

    dclean = xp.zeros_like(probability)  # dc
    dsigma = xp.zeros_like(probability)
    if dstats is not None:
        # 4  The clean logits: Σp feeds the balance loss, Σ lse² the z-loss.
        dclean += scores.sums_backward(probability, cache.lse, dstats, cache.mask, cache.shares)
        if load is not None and sigma is not None:
            # 2  The load: P = Φ((c − τ)/σ) depends on c and on σ ...
            q = scores.once_per_token(dstats.load * gaussian.density(load.z) / sigma, cache.mask)
            dclean += q
            dsigma -= q * load.z
            # 3  ... and on the threshold τ, which is the noisy logit of another expert.
            rows = xp.arange(len(cache.x))
            dnoisy[rows, load.first_out] -= (q * load.chosen).sum(1)
            dnoisy[rows, load.last_in] -= (q * ~load.chosen).sum(1)
    dclean += dnoisy  # h = c + ξ ⊙ σ

    dx = dclean @ params.w_gate.T
    dw_gate = cache.x.T @ dclean
    if params.w_noise is None:
        return dx, Router(dw_gate, None)
    if noise is None or cache.noise_logits is None:
        return dx, Router(dw_gate, xp.zeros_like(params.w_noise))
    dsigma += dnoisy * noise
    dnoise_logits = dsigma * (0.5 + 0.5 * xp.tanh(0.5 * cache.noise_logits))  # sigmoid, the slope of softplus
    dx += dnoise_logits @ params.w_noise.T
    return dx, Router(dw_gate, cache.x.T @ dnoise_logits)


def _probability_of_being_chosen(
    clean: Array, noisy: Array, sigma: Array, ranking: Array, chosen: Array
) -> tuple[Array, LoadCache]:
    """P(t, i): the probability that expert i is chosen if only its own noise is drawn again.

    Expert i is chosen if it beats the K-th best of the *others*. If i is one of the K best, the K-th best of the others
    is the (K+1)-th best of all; otherwise it is the K-th best of all.
    """
    xp = array_module(clean)
    last_in, first_out = ranking[:, -2], ranking[:, -1]
    rows = xp.arange(len(clean))
    threshold = xp.where(chosen, noisy[rows, first_out][:, None], noisy[rows, last_in][:, None])
    z = (clean - threshold) / sigma
    return gaussian.cumulative(z), LoadCache(z, chosen, last_in, first_out)


def _softplus(z: Array) -> Array:
    """log(1 + exp z), without overflow: max(z, 0) + log(1 + exp(−|z|)). Much faster than ``logaddexp(0, z)``."""
    xp = array_module(z)
    return xp.maximum(z, 0) + xp.log1p(xp.exp(-xp.abs(z)))
