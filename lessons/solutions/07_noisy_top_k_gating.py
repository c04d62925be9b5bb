"""Solutions of lesson 07: noisy top-k gating."""

import numpy as np

from minimoe import normal


def learning_logits(N, E, K, renormalize):
    """→ int: the number of logits whose gradient is not zero, for a dw of no special form."""
    if not renormalize:
        return N * E  # every logit stands in the denominator
    return 0 if K == 1 else N * K  # a single weight is always 1


def duel(c_0, c_1, sigma_0, sigma_1):
    """Four arrays (N,): clean logits and noise scales of the two → the chance of expert 0 (N,)."""
    return normal.cumulative((c_0 - c_1) / np.sqrt(sigma_0**2 + sigma_1**2))


def switch_backward(p, chosen, dw):
    """p (N, E), chosen (N, K) integers, dw (N, K) → dz (N, E)."""
    dp = np.zeros_like(p)  # zero where not chosen, and then a softmax like any other
    np.put_along_axis(dp, chosen, dw, axis=1)
    return p * (dp - (p * dp).sum(1, keepdims=True))


def sigmoid_gate_backward(s, chosen, dw):
    """s = sigmoid(z) (N, E), chosen (N, K) integers, dw (N, K) → dz (N, E)."""
    s_chosen = np.take_along_axis(s, chosen, axis=1)
    total = s_chosen.sum(1, keepdims=True)
    w = s_chosen / total
    ds = (dw - (w * dw).sum(1, keepdims=True)) / total  # at K = 1, zero again: it learns nothing either
    dz = np.zeros_like(s)
    np.put_along_axis(dz, chosen, ds * s_chosen * (1 - s_chosen), axis=1)
    return dz
