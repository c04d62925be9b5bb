"""Functions of scores (N, E) that several routers share: softmax, the largest of each row, sums over tokens."""

from __future__ import annotations

import numpy as np

from minimoe.core.arrays import Array, array_module, underflow_is_right
from minimoe.layers.routing import Choice, RouterStats


def largest(z: Array, count: int) -> Array:
    """Finite z (N, E) → (N, count), the columns of the largest numbers of each row.

    The largest comes first; among equal numbers, the lowest column comes first. The plain form is ``argsort``. If only
    a few of many numbers are wanted, repeated ``argmax`` is faster: three of 64 take an eighth of the time.
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


@underflow_is_right
def softmax(z: Array) -> tuple[Array, Array]:
    """z (N, E) → the softmax of each row, and log Σ exp(z) (N, 1), both without overflow for any finite z.

    Computed transposed, (E, N): NumPy reduces along rows of N numbers several times faster than along rows of E.
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


def sums(
    logits: Array,
    probability: Array,
    lse: Array,
    chosen: Array,
    gated: Array,
    counted: Array,
    mask: Array | None,
    shares: Array | None = None,
) -> RouterStats:
    """The sums over tokens from which the balancing losses are computed.

    The following are (N, E): the ``logits``, their softmax ``probability``, ``chosen`` (1 for a chosen expert, else 0),
    the weights ``gated`` (0 for an expert that is not chosen), and ``counted``, which is summed up as the load. ``lse``
    and ``mask`` are (N, 1). ``shares`` (B, E), from ``shares_by_sequence``, is given if a loss uses ``by_sequence``.
    """
    xp = array_module(logits)
    # The sum over tokens is a product with ones, which is faster than sum(0), or with the mask, which omits padding.
    present = xp.ones(len(logits), logits.dtype) if mask is None else mask[:, 0]  # (N,)
    return RouterStats(
        tokens=len(logits) if mask is None else mask.sum(),
        assignments=present @ chosen,
        probability=present @ probability,
        importance=present @ gated,
        load=present @ counted,
        squared_lse=present @ xp.square(lse[:, 0]),
        by_sequence=xp.zeros((), logits.dtype)
        if shares is None
        else present @ (probability * _by_token(shares, len(logits))).sum(1),
        entropy=present @ (lse[:, 0] - (probability * logits).sum(1)),  # −Σ p log p, since log p = logits − lse
    )


def shares_by_sequence(chosen: Array, batch: int, mask: Array | None) -> Array:
    """chosen (N, E), the choices of ``batch`` sequences → (B, E): E times each expert's share of the sequence's
    assignments."""
    xp = array_module(chosen)
    present = chosen if mask is None else chosen * mask
    counts = present.reshape(batch, -1, chosen.shape[1]).sum(1)
    return chosen.shape[1] * counts / xp.maximum(counts.sum(1, keepdims=True), 1)


def sums_backward(
    probability: Array, lse: Array, dstats: RouterStats, mask: Array | None, shares: Array | None = None
) -> Array:
    """The gradient with respect to Σp, Σ lse² and ``by_sequence`` → that of the logits (N, E), through their softmax p.

    Let u be the gradient with respect to p_t, the same for every token of a sequence that is not padding:

        u = dΣp + E f · dby_sequence,    dc = p ⊙ (u − Σ p u) + 2 lse · p · dΣlse²

    f, the sequence's own shares, comes from counts and is constant.
    """
    u = once_per_token(probability_backward(dstats, shares, len(probability)), mask)
    dlogits = probability * (u - (probability * u).sum(1, keepdims=True))
    dlogits += once_per_token(2 * dstats.squared_lse * lse, mask) * probability
    return dlogits


def probability_backward(dstats: RouterStats, shares: Array | None, tokens: int) -> Array:
    """The gradient with respect to Σp and ``by_sequence`` → that of p: (N, E), or (1, E) if all rows are equal."""
    u: Array = dstats.probability[None]
    return u if shares is None else u + dstats.by_sequence * _by_token(shares, tokens)


def _by_token(shares: Array, tokens: int) -> Array:
    """(B, E), a row per sequence → (N, E), a row per token."""
    return shares.repeat(tokens // len(shares), axis=0)


def once_per_token(gradient: Array, mask: Array | None) -> Array:
    """Passes the gradient with respect to a sum to every token that is part of the sum: padding gets none."""
    return gradient if mask is None else gradient * mask


def choice_of(taken: Array, weights: Array) -> tuple[Choice, Array]:
    """taken (N, E) bool and weights (N, E) ≥ 0 → each token's experts, best first, and which entries exist, (N, K).

    For routers that give a token any number of experts: K is the largest number that a token has, at least 1, and a
    token with fewer has entries at its end that do not exist.
    """
    xp = array_module(weights)
    most = max(int(taken.sum(1).max()), 1) if len(taken) else 1
    experts = largest(xp.where(taken, weights, -1), most)  # the others come last
    kept = xp.take_along_axis(taken, experts, axis=1)
    return Choice(experts, xp.take_along_axis(weights, experts, axis=1)), kept
