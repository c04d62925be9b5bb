"""Solutions of lesson 50: quantisation."""

from statistics import NormalDist

import numpy as np


def absmax_codes(w):
    """w (D, F) → codes (D, F) from −127 to 127, and c (F,)."""
    c = np.abs(w).max(0)
    return np.rint(127 * w / np.where(c > 0, c, 1)).astype(int), c


def normal_levels(bits):
    """→ 2^bits levels between −1 and 1, in ascending order."""
    n = 2**bits
    edge = (1 - 1 / (2 * n) + 1 - 1 / (2 * (n - 1))) / 2
    above = [NormalDist().inv_cdf(p) for p in np.linspace(edge, 0.5, n // 2 + 1)[:-1]]
    below = [-NormalDist().inv_cdf(p) for p in np.linspace(edge, 0.5, n // 2)[:-1]]
    return np.array(sorted([*below, 0, *above])) / max(above)


def hqq_round(w, step, z, bits):
    """w (G,), one group → z after one round, with p = 0.7 and β = 10."""
    q = np.clip(np.rint(w / step + z), 0, 2**bits - 1)
    error = w - (q - z) * step
    size = np.maximum(np.abs(error), 1e-9)  # an error of 0 has no outlier
    e = np.sign(error) * np.maximum(size - size ** (0.7 - 1) / 10, 0)
    return (q - (w - e) / step).mean()


def bits_per_weight(bits, group, meta_bits, meta_group):
    """→ bits of storage for each weight."""
    code = 32 / 10 if bits == 3 else bits
    of_a_group = 2 * (meta_bits + 2 * 16 / meta_group)  # step and zero point, with their shares of what they share
    return code + of_a_group / group
