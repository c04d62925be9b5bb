"""Solutions of lesson 61: hierarchies and EM."""

import numpy as np


def posteriors(g_root, g_branch, density):
    """g_root (N, I), g_branch (N, I, J), density (N, I, J) → h_i (N, I), h_{j|i} (N, I, J)."""
    within = g_branch * density  # (N, I, J)
    branch = g_root * within.sum(2)  # a branch is as likely as all its leaves together
    return branch / branch.sum(1, keepdims=True), within / within.sum(2, keepdims=True)


def fit_leaf(x, y, h, ridge, variance):
    """x (N, D), y (N, M), h (N,), ridge and the old σ² numbers → U (D, M), the new σ² a number."""
    weighted = h[:, None] * x
    # The derivative is zero where xᵀ h (y − x U)/σ² = ridge U; both sides were multiplied with σ².
    U = np.linalg.solve(weighted.T @ x + ridge * variance * np.eye(x.shape[1]), weighted.T @ y)
    return U, h @ ((y - x @ U) ** 2).mean(1) / h.sum()


def newton_gate(v, x, h, w):
    """v (D,), x (N, D), h (N,) posteriors of the first branch, w (N,) → the new v (D,)."""
    g = 1 / (1 + np.exp(-x @ v))
    slope = x.T @ (w * (h - g))
    curve = ((w * g * (1 - g))[:, None] * x).T @ x
    return v + np.linalg.solve(curve, slope)
