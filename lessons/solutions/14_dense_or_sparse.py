"""Solutions of lesson 14: dense or sparse."""

import numpy as np


def experts_touched(experts, active, batch):
    """Three whole numbers → a number."""
    missed_by_all = (1 - active / experts) ** batch
    return experts * (1 - missed_by_all)


def paired_difference(a, b):
    """Losses a and b (n,), one per seed → the mean difference (), its standard error ()."""
    difference = a - b
    return difference.mean(), difference.std(ddof=1) / np.sqrt(len(difference))


def tokens_per_second(shared, experts_total, E, K, batch, bytes_each, bandwidth, peak):
    """Counts of parameters; bytes per parameter; bytes and operations per second → tokens per second."""
    touched = 1 - (1 - K / E) ** batch  # the share of experts that is read
    reading = bytes_each * (shared + experts_total * touched) / bandwidth
    arithmetic = 2 * (shared + experts_total * K / E) * batch / peak
    return batch / max(reading, arithmetic)


def touched_backward(q, batch):
    """q (E,) probabilities, a whole number → dq (E,)."""
    # largest for the rarest expert: moving popularity to a frequent expert touches fewer experts; balance touches most
    return batch * (1 - q) ** (batch - 1)
