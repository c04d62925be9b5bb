"""Solutions of lesson 40: answering instructions."""

import numpy as np


def answer_loss_backward(z, target, m):
    """z (T, V), target (T,), m (T,) of 0 and 1 → dz (T, V)."""
    exp = np.exp(z - z.max(1, keepdims=True))
    dz = exp / exp.sum(1, keepdims=True)
    dz[np.arange(len(target)), target] -= 1
    return m[:, None] * dz / max(m.sum(), 1)


def pack(documents, T):
    """documents: pairs of ids and answer (0 or 1), both (n,) → tokens, targets, loss_mask, starts, each (T,)."""
    tokens, targets, loss_mask = np.zeros((3, T), int)
    starts = np.arange(T)
    start = 0
    for ids, answer in documents:
        stop = start + len(ids) - 1
        tokens[start:stop], targets[start:stop] = ids[:-1], ids[1:]
        loss_mask[start:stop] = answer[1:]
        starts[start:stop] = start
        start = stop
    return tokens, targets, loss_mask, starts


def visible(starts):
    """starts (T,) → (T, T) bools, [i, j]: may query i see key j?"""
    i, j = np.arange(len(starts))[:, None], np.arange(len(starts))
    return (starts[:, None] <= j) & (j <= i)


def mean_of_parts(parts):
    """parts: pairs of nats and m, both (n,) → the loss of all parts together."""
    total = sum((nats * m).sum() for nats, m in parts)
    return total / sum(m.sum() for _, m in parts)
