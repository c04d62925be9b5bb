"""Solutions of lesson 63: between two LSTMs."""

import numpy as np


def lstm_step(x, h, c, w_x, w_h, b):
    """x (B, D_in), h and c (B, D) before the step → h, c (B, D) after it."""
    D = h.shape[1]
    a = x @ w_x + h @ w_h + b  # (B, 4D)
    i, f, o = (1 / (1 + np.exp(-a[:, k * D : (k + 1) * D])) for k in range(3))
    u = np.tanh(a[:, 3 * D :])
    c = f * c + i * u
    return o * np.tanh(c), c


def lstm_step_backward(i, f, o, u, c_before, dh, dc):
    """All (B, D); dc is what the next step asks of the new cell → da (B, 4D), dc_before (B, D)."""
    shown = np.tanh(f * c_before + i * u)
    dc = dc + dh * o * (1 - shown**2)  # two paths: kept for the next step, and shown
    da = [dc * u * i * (1 - i), dc * c_before * f * (1 - f), dh * shown * o * (1 - o), dc * i * (1 - u**2)]
    return np.concatenate(da, axis=1), dc * f


def rows_per_expert(B, T, K, E):
    """→ two numbers: the mean rows of an expert in one call for all positions, and in one call per position."""
    return B * T * K / E, B * K / E


def paper_counts(D, F, E, K):
    """→ two numbers: products per position, and parameters."""
    lstms = 2 * (D * 4 * D + D * 4 * D)  # x and h, four blocks each
    router = 2 * D * E  # logits and noise
    expert = D * F + F * D
    return lstms + router + K * expert, lstms + router + E * expert
