"""Solutions of lesson 62: where, then what."""

import numpy as np


def bar(g, totals, margin):
    """g (N, E) a gate before the constraint, totals (E,), margin a number → w (N, E), the new totals (E,)."""
    w = g * (totals - totals.mean() <= margin)
    w = w / w.sum(1, keepdims=True)
    return w, totals + w.sum(0)


def experts_backward(x, W, g, dy):
    """x (N, D), W (E, D, F), g (N, E), dy (N, F) → dx (N, D), dW (E, D, F)."""
    da = g.T[:, :, None] * dy * (x @ W > 0)  # (E, N, F)
    dx = (da @ W.transpose(0, 2, 1)).sum(0)  # x goes to every expert
    return dx, x.T @ da


def information(gate, labels):
    """gate (N, E), labels (N,) → a number of bits."""
    kinds = np.unique(labels)
    joint = np.array([gate[labels == kind].sum(0) for kind in kinds]) / len(labels)  # (kinds, E)
    independent = joint.sum(1, keepdims=True) * joint.sum(0)
    return (joint * np.log2(joint / independent)).sum()


def ways(g1, g2):
    """g1 (N, E1), g2 (N, E2) → a number between 1 and E1 · E2."""
    pairs = g1.T @ g2 / len(g1)  # (E1, E2), adds up to 1
    return np.exp(-(pairs * np.log(pairs)).sum())
