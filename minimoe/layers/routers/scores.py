"""Functions of scores (N, E) that several routers share: softmax, the largest of each row, sums over tokens."""

from __future__ import annotations

import numpy as np

from minimoe.core.arrays import Array, array_module, underflow_is_right
from minimoe.layers.routing import RouterStats


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
    logits: Array, probability: Array, lse: Array, chosen: Array, gated: Array, counted: Array, mask: Array | None
) -> RouterStats:
    """The sums over tokens from which the balancing losses are computed.

    The following are (N, E): the ``logits``, their softmax ``probability``, ``chosen`` (1 for a chosen expert, else 0),
    the weights ``gated`` (0 for an expert that is not chosen), and ``counted``, which is summed up as the load. ``lse``
    and ``mask`` are (N, 1).
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
        entropy=present @ (lse[:, 0] - (probability * logits).sum(1)),  # −Σ p log p, since log p = logits − lse
    )


def sums_backward(probability: Array, lse: Array, dstats: RouterStats, mask: Array | None) -> Array:
    """The gradient with respect to Σp and Σ lse² → the gradient of the logits (N, E), through their full softmax p.

    Let u be the gradient with respect to Σp, which is the same for every token that is not padding:

        dc = p ⊙ (u − Σ p u) + 2 lse · p · dΣlse²
    """
    u = once_per_token(dstats.probability[None], mask)
    dlogits = probability * (u - (probability * u).sum(1, keepdims=True))
    dlogits += once_per_token(2 * dstats.squared_lse * lse, mask) * probability
    return dlogits


def once_per_token(gradient: Array, mask: Array | None) -> Array:
    """Passes the gradient with respect to a sum to every token that is part of the sum: padding gets none."""
    return gradient if mask is None else gradient * mask
