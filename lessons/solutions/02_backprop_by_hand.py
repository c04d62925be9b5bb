"""Solutions of lesson 02."""

import numpy as np


def linear_with_bias_backward(x, W, dy):
    """x (N, D), W (D, F), dy (N, F) → dx (N, D), dW (D, F), db (F,)."""
    return dy @ W.T, x.T @ dy, dy.sum(0)  # b is added to every token, so its gradient is the sum over tokens


def softmax_backward(p, dp):
    """p (N, V), dp (N, V) → dz (N, V)."""
    return p * (dp - (p * dp).sum(-1, keepdims=True))


def tied_backward(x, W, dy):
    """x (N, D), W (D, F), dy (N, D) → dx (N, D), dW (D, F)."""
    h = x @ W  # (N, F)
    dh = dy @ W  # (N, F)  back through y = h Wᵀ
    dW = x.T @ dh + dy.T @ h  # from x W, and from h Wᵀ: hᵀ dy is the gradient of Wᵀ, so its transpose is that of W
    return dh @ W.T, dW


def masked_cross_entropy_backward(p, targets, mask):
    """p (N, V), targets (N,), mask (N,) → dz (N, V)."""
    dz = p.copy()
    dz[np.arange(len(targets)), targets] -= 1
    return dz * (mask / mask.sum())[:, None]


def best_step(value, curvature, epsilon):
    """The h at which −2 ε |value| / h² + |curvature| / 2 = 0."""
    return 2 * np.sqrt(epsilon * abs(value) / abs(curvature))
