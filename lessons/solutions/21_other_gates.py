"""Solutions of lesson 21: other gates."""

import numpy as np


def cosine_backward(u, m, s, dz):
    """u (N, W), m (E, W), s a number, dz (N, E) → du, dm, ds."""
    length_u, length_m = np.linalg.norm(u, axis=1, keepdims=True), np.linalg.norm(m, axis=1, keepdims=True)
    unit_u, unit_m = u / length_u, m / length_m
    du, dm = s * dz @ unit_m, s * dz.T @ unit_u  # with respect to the unit vectors
    du = (du - unit_u * (unit_u * du).sum(1, keepdims=True)) / length_u
    dm = (dm - unit_m * (unit_m * dm).sum(1, keepdims=True)) / length_m
    return du, dm, (dz * (unit_u @ unit_m.T)).sum()


def penalties(penalty, counts, N, K):
    """penalty λ, counts (S, L, E): how many of N tokens wake each expert, in S steps → λ after each step, (S,)."""
    S, L, E = counts.shape
    zeros = L * N * E - counts.sum((1, 2))  # (S,)
    directions = np.sign(L * N * (E - K) - zeros)  # whole numbers, so that equal is equal
    return penalty * 1.2 ** np.cumsum(directions)


def remoe_backward(z, dw, penalty, K):
    """z (N, E), dw (N, E), penalty λ → dz (N, E)."""
    N, E = z.shape
    f = E * (z > 0).sum(0) / (K * N)  # (E,)
    return (z > 0) * (dw + penalty * f / N)


def experts_of_top_p(p, P):
    """p (N, E), P a number → how many experts each token uses, (N,) integers."""
    ranked = -np.sort(-p, axis=1)
    before = np.cumsum(ranked, axis=1) - ranked  # what the better experts add up to
    return (before < P).sum(1)


def entropy_backward(p):
    """p = softmax(z) (N, E) → dz (N, E) of the mean entropy over the tokens."""
    H = -(p * np.log(p)).sum(1, keepdims=True)
    return -p * (np.log(p) + H) / len(p)
