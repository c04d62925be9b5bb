"""Solutions of lesson 08: load balancing."""

import numpy as np


def collapsed_score(E, K):
    """→ a number: E Σ f_e p̄_e when all tokens choose the same K experts."""
    return E / K  # K experts, each with f = 1/K and p̄ = 1/K


def bias_step(b, counts, gamma):
    """b (E,), counts (E,) of assignments in the last step, gamma a number → the new b (E,)."""
    return b + gamma * np.sign(counts.mean() - counts)


def entropy_backward(p):
    """p = softmax(c) (N, E) → dc (N, E)."""
    u = (np.log(p.mean(0)) + 1) / len(p)  # (E,)  the gradient with respect to p, the same for every token
    return p * (u - (p * u).sum(1, keepdims=True))


def sequence_balance_backward(p, chosen):
    """p = softmax(c) (B, T, E), chosen (B, T, K) integers → dc (B, T, E)."""
    B, T, E = p.shape
    counts = np.stack([np.bincount(sequence.ravel(), minlength=E) for sequence in chosen])
    f = counts / counts.sum(1, keepdims=True)  # (B, E)
    u = E * f[:, None] / (B * T)  # (B, 1, E)  the gradient with respect to p, the same within a sequence
    return p * (u - (p * u).sum(2, keepdims=True))
