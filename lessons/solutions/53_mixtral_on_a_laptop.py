"""Solutions of lesson 53: a Mixtral on a laptop."""

import numpy as np


def lru_hits(experts, slots):
    """experts (N,), slots → how many uses find their expert in memory."""
    held, hits = [], 0  # the one used last is at the end
    for expert in experts.tolist():
        if expert in held:
            hits += 1
            held.remove(expert)
        elif len(held) == slots:
            held.pop(0)
        held.append(expert)
    return hits


def oracle_drops(held, future):
    """held, a list of experts, and the uses to come (M,) → the expert to drop."""
    coming = future.tolist()
    return max(held, key=lambda expert: coming.index(expert) if expert in coming else len(coming))


def seconds_per_token(weights, bits, hit_rate, bandwidth, compute):
    """→ seconds for one token, if reading and computing take turns."""
    return weights * bits / 8 * (1 - hit_rate) / bandwidth + compute


def bytes_of_a_batch(experts, batch, size):
    """experts (N, K) → bytes read per token, if each batch reads every expert that it needs once."""
    groups = experts.reshape(-1, batch * experts.shape[1])
    return sum(len(np.unique(group)) for group in groups) * size / len(experts)
