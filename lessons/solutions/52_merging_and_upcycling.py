"""Solutions of lesson 52: merging and upcycling."""

import numpy as np


def slerp(a, b, t):
    """a and b (P,) → the point at t of the arc from a to b."""
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    if abs(cosine) > 0.9995:  # sin ω would be almost 0
        return (1 - t) * a + t * b
    omega = np.arccos(cosine)
    return (np.sin((1 - t) * omega) * a + np.sin(t * omega) * b) / np.sin(omega)


def ties(deltas, keep):
    """deltas (n, P) → the merged task vector (P,); int(keep · P) entries of each are kept."""
    n, P = deltas.shape
    trimmed = np.zeros_like(deltas)
    for i, delta in enumerate(deltas):
        largest = np.argsort(-abs(delta))[: int(keep * P)]
        trimmed[i, largest] = delta[largest]
    sign = np.sign(trimmed.sum(0))  # a large entry has more to say than a small one
    agree = (np.sign(trimmed) == sign) & (sign != 0)
    return (trimmed * agree).sum(0) / np.maximum(agree.sum(0), 1)


def w_down_factor(E, K, G, renormalize):
    """E copies in G slices each, K copies for each token → what W_down is multiplied by."""
    # Renormalised: each slice has 1/(K G), and the slices of each of the K copies add up to W_down / G.
    # Otherwise: each slice has 1/(E G); the K copies add up to K/(E G).
    return G if renormalize else E * G / K
