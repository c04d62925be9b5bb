"""Solutions of lesson 13."""

import numpy as np


def either_by_chance(E, K):
    """1 − the chance that the second token draws K experts, one by one, and none is among the K of the first."""
    return 1 - np.prod([(E - K - i) / (E - i) for i in range(K)])


def shuffled_exactly(counts):
    """A token of expert e has counts[e] − 1 partners among the N − 1 others."""
    N = counts.sum()
    return (counts * (counts - 1)).sum() / (N * (N - 1))


def jensen_shannon_backward(p):
    """p (n, E) → dp (n, E). d/dp of −p log p is −log p − 1; the constants of the mixture and the rows cancel."""
    return (np.log2(p) - np.log2(p.mean(0))) / len(p)


def one_a_second(parameters, people):
    """1.8e12 parameters and 8e9 people: 57,039 years, and 225 seconds."""
    return parameters / (365.25 * 24 * 3600), parameters / people
