"""Solutions of lesson 09: the mixture-of-experts layer."""

import numpy as np


def computed_rows(counts, block):
    """counts (E,), the entries of each expert → the rows with blocks, and with equal slots: two ints."""
    blocks = -(-counts // block)  # division that rounds up
    return blocks.sum() * block, len(counts) * counts.max()


def place_without_sorting(chosen, E):
    """chosen (N, K) → place (N, K), the place of each entry in a stable sort by expert."""
    entries = chosen.reshape(-1)
    one_hot = (entries[:, None] == np.arange(E)).astype(int)  # (N·K, E)
    counts = one_hot.sum(0)
    first = np.cumsum(counts) - counts  # (E,)  where each expert begins
    earlier = np.cumsum(one_hot, axis=0) - one_hot  # (N·K, E)  earlier entries of each expert
    return (first[entries] + earlier[np.arange(len(entries)), entries]).reshape(chosen.shape)


def weighted_input_backward(x, weights, place, dz):
    """x (N, D), weights and place (N, K), dz (N·K, D) sorted by expert → dx (N, D), dweights (N, K)."""
    dz_by_token = dz[place]  # (N, K, D)
    return (weights[:, :, None] * dz_by_token).sum(1), (x[:, None] * dz_by_token).sum(2)


def renormalize_kept_backward(w, kept, dv):
    """w (N, K) positive, kept (N, K) bool, dv (N, K) → dw (N, K)."""
    total = (kept * w).sum(1, keepdims=True)
    total[total == 0] = 1  # all entries were dropped: v is 0, whatever w is
    v = kept * w / total
    return kept * (dv - (v * dv).sum(1, keepdims=True)) / total
