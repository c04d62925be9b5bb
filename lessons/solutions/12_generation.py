"""Solutions of lesson 12: generation."""

import numpy as np


def cache_bytes(config, tokens, bytes_per_number):
    """A ModelConfig and two whole numbers → a whole number of bytes."""
    kept = tokens if config.window is None else min(tokens, config.window)
    return 2 * config.layers * config.kv_heads * config.head_width * kept * bytes_per_number


def min_p_probabilities(logits, min_p):
    """logits (V,), min_p in (0, 1] → the probability (V,) of each token to be drawn."""
    p = np.exp(logits - logits.max())  # relative to the likeliest token, as the filter needs it
    p[p < min_p] = 0
    return p / p.sum()


def attend_one(q, keys, values, window):
    """q (H, C), keys and values (S, G, C), a whole number → o (H, C)."""
    keys, values = keys[-window:], values[-window:]
    H, C = q.shape
    G = keys.shape[1]
    q = q.reshape(G, H // G, C)
    weights = np.exp(q @ keys.transpose(1, 2, 0) * C**-0.5)  # (G, H/G, S); small scores need no shift
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ values.transpose(1, 0, 2)).reshape(H, C)


def entropy_backward(logits, temperature):
    """logits (V,), a number → dlogits (V,), dtemperature ()."""
    s = logits / temperature
    p = np.exp(s - s.max())
    p /= p.sum()
    surprise = -np.log(p)
    ds = p * (surprise - (p * surprise).sum())
    # Σ ds·s is −Var(s): a higher temperature raises the entropy, unless all logits are equal
    return ds / temperature, -(ds * s).sum() / temperature
