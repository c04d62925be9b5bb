"""Solutions of lesson 05: attention."""

import numpy as np


def visible_pairs(T, window):
    """→ int: the number of pairs (i, j) that are not masked."""
    return sum(min(i + 1, window) for i in range(T))


def temperature_backward(S, temperature, dA):
    """S and dA (T, T), temperature a number → dS (T, T), dtemperature a number."""
    A = np.exp((S - S.max(1, keepdims=True)) / temperature)
    A /= A.sum(1, keepdims=True)
    dZ = A * (dA - (A * dA).sum(1, keepdims=True))  # Z = S/τ
    return dZ / temperature, -(dZ * S).sum() / temperature**2


def keys_as_values_backward(A, q, k, do):
    """A (T, T), q, k and do (T, C) → dq (T, C), dk (T, C)."""
    dA = do @ k.T
    dS = A * (dA - (A * dA).sum(1, keepdims=True)) / np.sqrt(q.shape[1])
    return dS @ k, A.T @ do + dS.T @ q  # dk: k as value, plus k as key


def sink_backward(A, dA):
    """A and dA (T, T) → dS (T, T), db a number."""
    gathered = (A * dA).sum(1, keepdims=True)  # (T, 1)
    sink_weight = 1 - A.sum(1, keepdims=True)  # (T, 1)
    # the sink is one more score, and its own dA is 0: db is the same formula with dA = 0
    return A * (dA - gathered), (sink_weight * (0 - gathered)).sum()
