"""Probabilities as logarithms: where a density is exp(−10⁶), its logarithm is still an ordinary number."""

from __future__ import annotations

from minimoe.core.arrays import Array, array_module, underflow_is_right


def log_sum_exp(x: Array) -> Array:
    """log Σ exp(x) over the last axis, which is kept with length 1.

    The largest entry is subtracted first, so that at least one of the exponentials is 1. Otherwise all of them could
    become zero, so that the logarithm is −∞, or one of them could overflow.
    """
    largest = x.max(-1, keepdims=True)
    return largest + array_module(x).log(exp(x - largest).sum(-1, keepdims=True))


def log_softmax(x: Array) -> Array:
    """The logarithms of numbers that add up to 1 over the last axis, in the ratios exp(x)."""
    return x - log_sum_exp(x)


@underflow_is_right
def exp(x: Array) -> Array:
    """exp(x); a result that is too small for its dtype is 0."""
    return array_module(x).exp(x)
