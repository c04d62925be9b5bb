"""The router: which K of E experts each token goes to, and with what weight. Noisy top-k gating.

    c = x W_gate                     clean logits
    h = c + ξ ⊙ σ,                   σ = softplus(x W_noise) + 0.01,   ξ ~ N(0, 1), only in training
    S = the K largest of h           the lowest index wins a tie
    w = softmax(h_S)                 Mixtral's order: choose, then normalise over the chosen
    w = softmax(h)_S                 without ``renormalize``, as in Switch: unchosen logits count too

The noise does not stop at exploring: through σ a token learns *how much* to explore, and it makes the probability of
being chosen a smooth function, which the load loss needs:

    P(t, i) = Φ((c_ti − τ_ti) / σ_ti),    τ_ti = the K-th largest of h_t without i

A router also sums, over its tokens, everything that the balancing losses are made of (``RouterStats``). Sums over the
shards of a batch add up, so the losses never depend on how a batch was split.

Shazeer et al. 2017, arXiv 1701.06538; Jiang et al. 2024, arXiv 2401.04088; Fedus et al. 2021, arXiv 2101.03961.
Lesson: lessons/07_noisy_top_k_gating.ipynb
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe import normal
from minimoe.arrays import Array, array_module

NOISE_FLOOR = 0.01
"""Added to every noise scale σ, as in the authors' code, so that nothing is divided by zero."""


class Router(NamedTuple):
    w_gate: Array  # (D, E)
    w_noise: Array | None  # (D, E), or None for plain top-k


class Routing(NamedTuple):
    """A sparse matrix, tokens × experts, with K entries a row."""

    experts: Array  # (N, K)  columns, best first
    weights: Array  # (N, K)  values; their order is that of ``experts``


class RouterStats(NamedTuple):
    """Sums over tokens; also the gradient of a loss with respect to each of these sums."""

    tokens: Any  # ()   N
    assignments: Array  # (E,)  how often each expert was chosen; a count, which has no gradient
    probability: Array  # (E,)  Σ_t softmax(c_t), the full softmax of the clean logits
    importance: Array  # (E,)  Σ_t w_t, zero where not chosen
    load: Array  # (E,)  Σ_t P(t, ·); the assignments where P was not asked for, or has no noise, or K = E
    squared_lse: Array  # ()    Σ_t (log Σ_e exp c_te)²
    entropy: Array  # ()    Σ_t −Σ_e p log p of softmax(c_t), in nats; reported, not trained


class LoadCache(NamedTuple):
    """What the estimator of the probability of being chosen leaves for backward."""

    z: Array  # (N, E)  (c − τ) / σ
    chosen: Array  # (N, E)  bool
    last_in: Array  # (N,)    the K-th expert
    first_out: Array  # (N,)    the (K+1)-th expert


class Cache(NamedTuple):
    x: Array  # (N, D)
    probability: Array  # (N, E)  softmax(c)
    lse: Array  # (N, 1)
    ranking: Array  # (N, K or K+1)  experts, best first, one beyond the chosen where there is one
    gate: Array  # (N, K) the weights, or (N, E) softmax(h) if not renormalised
    noise: Array | None  # (N, E)  ξ
    noise_logits: Array | None  # (N, E)  x W_noise
    sigma: Array | None  # (N, E)
    load: LoadCache | None
    mask: Array | None  # (N, 1)
    renormalize: bool


def init(
    rng: np.random.Generator,
    width: int,
    experts: int,
    *,
    noisy: bool = True,
    std: float = 0.02,
    dtype: DTypeLike = np.float32,
) -> Router:
    """W_gate drawn from N(0, std²), W_noise zero, so that every σ starts at softplus(0) + 0.01 ≈ 0.70."""
    w_gate = (std * rng.standard_normal((width, experts))).astype(dtype)
    return Router(w_gate, np.zeros((width, experts), dtype) if noisy else None)


def forward(
    params: Router,
    x: Array,
    top_k: int,
    *,
    renormalize: bool = True,
    noise: Array | None = None,
    estimate_load: bool = True,
    mask: Array | None = None,
) -> tuple[Routing, RouterStats, Cache]:
    """x (N, D) → the routing of its N tokens and the sums over them.

    ``noise`` (N, E) is ξ, drawn from N(0, 1) by the caller; None, or a router without W_noise, chooses by the clean
    logits. ``mask`` (N,) of 0 and 1 leaves padding out of the sums. ``estimate_load=False`` saves the work for P(t, i)
    where no loss uses it.
    """
    xp = array_module(x)
    tokens, experts = len(x), params.w_gate.shape[1]
    mask = None if mask is None else mask.reshape(-1, 1).astype(x.dtype)

    clean = x @ params.w_gate  # (N, E)
    probability, lse = _softmax(clean)
    noise_logits = sigma = None
    noisy = clean
    if noise is not None and params.w_noise is not None:
        noise_logits = x @ params.w_noise
        sigma = _softplus(noise_logits) + NOISE_FLOOR
        noisy = clean + noise * sigma
    else:
        noise = None

    # one beyond the chosen: its logit is the threshold that a chosen expert must stay above
    ranking = _largest(noisy, min(top_k + 1, experts))
    chosen = ranking[:, :top_k]
    if renormalize:
        weights = gate = _softmax(xp.take_along_axis(noisy, chosen, axis=1))[0]
    else:
        gate = probability if noisy is clean else _softmax(noisy)[0]
        weights = xp.take_along_axis(gate, chosen, axis=1)

    one_hot = xp.zeros((tokens, experts), x.dtype)
    xp.put_along_axis(one_hot, chosen, 1, axis=1)
    gated = xp.zeros_like(one_hot)
    xp.put_along_axis(gated, chosen, weights, axis=1)
    counted = one_hot
    load_cache = None
    if sigma is not None and estimate_load and top_k < experts:
        counted, load_cache = _probability_of_being_chosen(clean, noisy, sigma, ranking, one_hot > 0)

    present = xp.ones(tokens, x.dtype) if mask is None else mask[:, 0]  # (N,) so that a sum over tokens is a product
    stats = RouterStats(
        tokens=tokens if mask is None else mask.sum(),
        assignments=present @ one_hot,
        probability=present @ probability,
        importance=present @ gated,
        load=present @ counted,
        squared_lse=present @ xp.square(lse[:, 0]),
        entropy=present @ (lse[:, 0] - (probability * clean).sum(1)),
    )
    cache = Cache(x, probability, lse, ranking, gate, noise, noise_logits, sigma, load_cache, mask, renormalize)
    return Routing(chosen, weights), stats, cache


def backward(params: Router, cache: Cache, dweights: Array, dstats: RouterStats | None) -> tuple[Array, Router]:
    """dweights (N, K), and the gradient of the losses by the sums → dx (N, D) and the gradients of W_gate, W_noise.

    Four paths lead back to the logits; the third is the one that is easily forgotten:

        weights      renormalised: dh_S = w ⊙ (dw − Σ w dw); otherwise dh = p ⊙ (1_S dw − Σ_S p dw)
        load         q = dP φ(z)/σ:  dc += q,  dσ −= q z
        threshold    τ is itself a logit: dh_τ −= q, the (K+1)-th for the chosen, the K-th for the others
        clean logits dc += p ⊙ (u − Σ p u) from Σp,  dc += 2 lse · p from Σ lse²

    Then h = c + ξ ⊙ σ gives dc += dh, dσ += dh ⊙ ξ, and σ = softplus(r) gives dr = dσ ⊙ sigmoid(r).
    """
    xp = array_module(dweights)
    x, probability, lse, ranking, gate, noise, noise_logits, sigma, load, mask, renormalize = cache
    top_k = dweights.shape[1]
    chosen = ranking[:, :top_k]

    def once_per_token(gradient: Array) -> Array:
        """The gradient of a sum reaches every token that was counted in it."""
        return gradient if mask is None else gradient * mask

    if dstats is not None:
        dweights = dweights + once_per_token(dstats.importance[chosen])
    dnoisy = xp.zeros_like(probability)  # dh
    if renormalize:
        along = (gate * dweights).sum(1, keepdims=True)
        xp.put_along_axis(dnoisy, chosen, gate * (dweights - along), axis=1)
    else:
        xp.put_along_axis(dnoisy, chosen, dweights, axis=1)
        dnoisy -= (gate * dnoisy).sum(1, keepdims=True)
        dnoisy *= gate

    dclean = xp.zeros_like(probability)  # dc
    dsigma = xp.zeros_like(probability)
    if dstats is not None:
        u = once_per_token(dstats.probability[None])
        dclean += probability * (u - (probability * u).sum(1, keepdims=True))
        dclean += once_per_token(2 * dstats.squared_lse * lse) * probability
        if load is not None and sigma is not None:
            q = once_per_token(dstats.load * normal.density(load.z) / sigma)
            dclean += q
            dsigma -= q * load.z
            rows = xp.arange(len(x))
            dnoisy[rows, load.first_out] -= (q * load.chosen).sum(1)
            dnoisy[rows, load.last_in] -= (q * ~load.chosen).sum(1)
    dclean += dnoisy

    dx = dclean @ params.w_gate.T
    dw_gate = x.T @ dclean
    if params.w_noise is None:
        return dx, Router(dw_gate, None)
    if noise is None or noise_logits is None:
        return dx, Router(dw_gate, xp.zeros_like(params.w_noise))
    dsigma += dnoisy * noise
    dnoise_logits = dsigma * (0.5 + 0.5 * xp.tanh(0.5 * noise_logits))
    dx += dnoise_logits @ params.w_noise.T
    return dx, Router(dw_gate, x.T @ dnoise_logits)


def _probability_of_being_chosen(
    clean: Array, noisy: Array, sigma: Array, ranking: Array, chosen: Array
) -> tuple[Array, LoadCache]:
    """P(t, i): the chance that expert i is chosen if its own noise, and nothing else, is drawn again.

    Expert i is chosen if it beats the K-th best of the *others*. For one of the K best that is the (K+1)-th of all;
    for any other, the K-th.
    """
    xp = array_module(clean)
    last_in, first_out = ranking[:, -2], ranking[:, -1]
    rows = xp.arange(len(clean))
    threshold = xp.where(chosen, noisy[rows, first_out][:, None], noisy[rows, last_in][:, None])
    z = (clean - threshold) / sigma
    return normal.cumulative(z), LoadCache(z, chosen, last_in, first_out)


def _largest(z: Array, count: int) -> Array:
    """Finite z (N, E) → columns of the largest of each row, largest first, the lowest of equals first: (N, count).

    Few of many are looked for one after the other: three of 64 in an eighth of the time that sorting takes.
    """
    xp = array_module(z)
    if count > z.shape[1] // 8:
        ranking: Array = xp.argsort(-z, axis=1, kind="stable")
        return ranking[:, :count]
    left = z.copy()
    rows = xp.arange(len(z))
    columns = []
    for _ in range(count):
        columns.append(left.argmax(1))
        left[rows, columns[-1]] = -np.inf
    found: Array = xp.stack(columns, axis=1)
    return found


def _softmax(z: Array) -> tuple[Array, Array]:
    """z (N, E) → softmax of each row, and log Σ exp(z) (N, 1), both safe for any finite z.

    It is taken lying down, (E, N): NumPy goes through N numbers at a time several times faster than through E.
    """
    xp = array_module(z)
    p = z.T.copy()
    peak = p.max(0)
    p -= peak
    xp.exp(p, out=p)
    total = p.sum(0)
    p /= total
    lse = peak + xp.log(total)
    return p.T.copy(), lse[:, None]


def _softplus(z: Array) -> Array:
    """log(1 + exp z), without overflow: max(z, 0) + log(1 + exp(−|z|)), far faster than ``logaddexp``."""
    xp = array_module(z)
    return xp.maximum(z, 0) + xp.log1p(xp.exp(-xp.abs(z)))
