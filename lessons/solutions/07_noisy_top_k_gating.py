"""Solutions of lesson 07: noisy top-k gating."""

import numpy as np

from minimoe.core import gaussian


def learning_logits(N, E, K, renormalize):
    """→ int: the number of logits whose gradient is not zero, for a general dw."""
    if not renormalize:
        return N * E  # every logit is in the denominator
    return 0 if K == 1 else N * K  # a single renormalised weight is always 1


def duel(c_0, c_1, sigma_0, sigma_1):
    """Four arrays (N,): the clean logits and noise scales of both experts → the chance of expert 0 (N,)."""
    return gaussian.cumulative((c_0 - c_1) / np.sqrt(sigma_0**2 + sigma_1**2))


def switch_backward(p, chosen, dw):
    """p (N, E), chosen (N, K) integers, dw (N, K) → dc (N, E)."""
    dp = np.zeros_like(p)  # zero where an expert is not chosen; the rest is an ordinary softmax
    np.put_along_axis(dp, chosen, dw, axis=1)
    return p * (dp - (p * dp).sum(1, keepdims=True))


def sigmoid_gate_backward(s, chosen, dw):
    """s = sigmoid(c) (N, E), chosen (N, K) integers, dw (N, K) → dc (N, E)."""
    s_chosen = np.take_along_axis(s, chosen, axis=1)
    total = s_chosen.sum(1, keepdims=True)
    w = s_chosen / total
    ds = (dw - (w * dw).sum(1, keepdims=True)) / total  # zero at K = 1, so this gate learns nothing there either
    dc = np.zeros_like(s)
    np.put_along_axis(dc, chosen, ds * s_chosen * (1 - s_chosen), axis=1)
    return dc
