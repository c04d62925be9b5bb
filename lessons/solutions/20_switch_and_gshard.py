"""Solutions of lesson 20: Switch and GShard."""

import numpy as np


def mean_second_weight(g2, theta):
    """g2 (N,), theta a number → (N,): the mean of w₂ over the draws of u."""
    return g2 * np.minimum(1, g2 / theta)  # its weight, times the chance that it is kept


def mean_weights_backward(g, dw):
    """g = softmax(z) (N, 2), dw (N, 2) of w = (g₁, 2 g₂²) → dz (N, 2)."""
    dg = np.stack([dw[:, 0], 4 * g[:, 1] * dw[:, 1]], axis=1)
    return g * (dg - (g * dg).sum(1, keepdims=True))


def places(chosen, experts):
    """chosen (N, K) integers, experts = E → (N, K): the place of each entry in the queue of its expert, from 0."""
    N, K = chosen.shape
    line = chosen.T.reshape(-1)  # all first choices, then all second choices, ...
    queue = np.eye(experts, dtype=int)[line].cumsum(0)  # (K·N, E)  one queue, however many choices there are
    return np.stack((queue[np.arange(N * K), line] - 1).reshape(K, N), axis=1)


def balanced_assignment(scores):
    """scores (N, E) → (N,) integers: the expert of each token."""
    N, E = scores.shape
    expert_of = np.repeat(np.arange(E), N // E)  # of each of the N places
    price, owner = np.zeros(N), np.full(N, -1)
    waiting = list(range(N))
    while waiting:
        token = waiting.pop()
        gain = scores[token, expert_of] - price
        place = gain.argmax()
        second_best = np.delete(gain, place).max()
        price[place] += gain[place] - second_best + 1 / (N + 1)  # as much as the place is worth to this token
        if owner[place] >= 0:
            waiting.append(owner[place])  # outbid
        owner[place] = token
    result = np.empty(N, int)
    result[owner] = expert_of
    return result
