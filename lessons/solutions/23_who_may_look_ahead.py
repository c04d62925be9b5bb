"""Solutions of lesson 23: who may look ahead."""

import numpy as np


def moved_earlier(layer, x, new):
    """layer: (T, D) → (T, D), x and new (T, D) → (T, T) bools, [s, t]: replacing token s moves output t < s."""
    T = len(x)
    y = layer(x)
    moved = np.zeros((T, T), bool)
    for s in range(T):
        other = x.copy()
        other[s] = new[s]
        moved[s, :s] = abs(layer(other) - y)[:s].max(1, initial=0) > 1e-9
    return moved


def choose_tokens(p, real, K):
    """p (B, T, E), real (B, T) bools, False for padding → taken (B, T, E) bools."""
    B, T, E = p.shape
    taken = np.zeros((B, T, E), bool)
    for b in range(B):
        c = int(np.ceil(K * real[b].sum() / E))
        ranked = np.where(real[b][:, None], p[b], -1)
        best_first = np.argsort(-ranked, axis=0, kind="stable")  # (T, E)  along the tokens
        np.put_along_axis(taken[b], best_first[:c], True, axis=0)
    return taken


def renormalized_backward(p, taken, dw):
    """p = softmax(z) (T, E), taken (T, E) bools, dw (T, E) → dz (T, E), with w = p / Σ p over those that took."""
    kept = p * taken
    w = kept / np.maximum(kept.sum(1, keepdims=True), 1e-12)  # a token without an expert: 0, not 0/0
    return w * (dw - (w * dw).sum(1, keepdims=True))  # the softmax over the logits of those that took


def next_threshold(tau, load, N, K):
    """tau (E,), load (E,): how many of the N tokens each expert took → the new tau (E,)."""
    fair = K * N / len(tau)
    return tau * np.exp(0.05 * (load / fair - 1))


def two_softmaxes(L):
    """L (B, T, S) → D, C (B, T, S): what each slot reads, and what each token takes."""
    exp = np.exp(L)
    return exp / exp.sum(1, keepdims=True), exp / exp.sum(2, keepdims=True)
