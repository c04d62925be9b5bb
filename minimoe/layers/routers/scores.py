"""Functions of scores (N, E) that several routers share: softmax, the largest of each row, sums over tokens."""

from __future__ import annotations

import numpy as np

from minimoe.core.arrays import Array, array_module
from minimoe.layers.routing import RouterStats


def largest(z: Array, count: int) -> Array:
    """Finite z (N, E) → columns of the largest of each row, largest first, the lowest of equals first: (N, count).

    Few of many are searched one after the other: three of 64 take an eighth of the time of sorting. The plain form is
    the ``argsort`` below.
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


def softmax(z: Array) -> tuple[Array, Array]:
    """z (N, E) → softmax of each row, and log Σ exp(z) (N, 1), both safe for any finite z.

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
    logits: Array, probability: Array, lse: Array, chosen: Array, gated: Array, counted: Array, mask: Array | None
) -> RouterStats:
    """The sums over tokens of which the balancing losses are made.

    ``logits`` and their softmax ``probability``, what was ``chosen`` (0 or 1), the weights ``gated`` (0 where not
    chosen) and what is ``counted`` as load are (N, E); ``lse`` and ``mask`` are (N, 1).
    """
    xp = array_module(logits)
    # A sum over tokens as a product with ones, or with the mask, is faster than sum(0), and leaves padding out.
    present = xp.ones(len(logits), logits.dtype) if mask is None else mask[:, 0]  # (N,)
    return RouterStats(
        tokens=len(logits) if mask is None else mask.sum(),
        assignments=present @ chosen,
        probability=present @ probability,
        importance=present @ gated,
        load=present @ counted,
        squared_lse=present @ xp.square(lse[:, 0]),
        entropy=present @ (lse[:, 0] - (probability * logits).sum(1)),
    )


def sums_backward(probability: Array, lse: Array, dstats: RouterStats, mask: Array | None) -> Array:
    """The gradient with respect to Σp and Σ lse² → the gradient of the logits (N, E), by way of their full softmax p.

    With u the gradient with respect to Σp, the same for every token that counts:

        dc = p ⊙ (u − Σ p u) + 2 lse · p · dΣlse²
    """
    u = once_per_token(dstats.probability[None], mask)
    dlogits = probability * (u - (probability * u).sum(1, keepdims=True))
    dlogits += once_per_token(2 * dstats.squared_lse * lse, mask) * probability
    return dlogits


def once_per_token(gradient: Array, mask: Array | None) -> Array:
    """The gradient with respect to a sum reaches every token that was counted in it, and no padding."""
    return gradient if mask is None else gradient * mask
