"""Wrong answers to the exercises of lesson 08, each with words that its hint must hold."""

import numpy as np

from minimoe.exercises import lesson_08 as check


def through_softmax(p, u):
    return p * (u - (p * u).sum(-1, keepdims=True))


def bias_step(step, old=True):
    """The right new bias but for the step, or without the old one."""
    return lambda b, counts, gamma: old * b + gamma * step(counts.mean() - counts)


def by_p(p):
    return np.tile((np.log(p.mean(0)) + 1) / len(p), (len(p), 1))


def no_mean(p):
    return p * by_p(p)


def each_by_itself(p):
    return through_softmax(p, np.log(p) + 1) / len(p)


def sum_of_tokens(p):
    return through_softmax(p, by_p(p)) * len(p)


def maximised(p):
    return -through_softmax(p, by_p(p))


def sequences(own=True, k=1, mean=True, tokens=True, softmax=True, average=True, only_chosen=False):
    """The right gradient but for one thing."""

    def sequence_balance_backward(p, chosen):
        B, T, E = p.shape
        counts = np.stack([np.bincount(sequence.ravel(), minlength=E) for sequence in chosen])
        f = counts / counts.sum(1, keepdims=True) * (chosen.shape[2] if k != 1 else 1)
        f = f if own else f.mean(0, keepdims=True)
        u = np.broadcast_to(E * f[:, None] / ((B if mean else 1) * (T if tokens else 1)), p.shape)
        if not softmax:
            return u
        dz = p * (u - average * (p * u).sum(2, keepdims=True))
        if only_chosen:
            mask = np.zeros_like(p)
            np.put_along_axis(mask, chosen, 1.0, axis=2)
            dz = mask * dz
        return dz

    return sequence_balance_backward


WRONG = {
    check.collapsed_score: [
        (lambda E, K: E, "adds up to 1"),
        (lambda E, K: E / K**2, "summed over the K experts"),
        (lambda E, K: 1, "perfect balance"),
        (lambda E, K: K / E, "one over the score"),
    ],
    check.bias_step: [
        (bias_step(lambda ahead: -np.sign(ahead)), "wrong way"),
        (bias_step(lambda ahead: ahead), "same size γ"),
        (bias_step(lambda ahead: ahead / 20), "share of the load"),
        (bias_step(np.sign, old=False), "old b is missing"),
        (bias_step(lambda ahead: np.where(ahead >= 0, 1, -1)), "does not move"),
        (bias_step(lambda ahead: np.where(ahead > 0, 1, -1)), "stays where it is"),
    ],
    check.entropy_backward: [
        (by_p, "the softmax is left"),
        (no_mean, "lacks the softmax's mean"),
        (each_by_itself, "each token undecided by itself"),
        (sum_of_tokens, "1/N"),
        (maximised, "wrong way"),
    ],
    check.sequence_balance_backward: [
        (sequences(own=False), "its own f"),
        (sequences(k=4), "adds up to K"),
        (sequences(mean=False), "B sequences is missing"),
        (sequences(tokens=False), "T tokens of a sequence is missing"),
        (sequences(softmax=False), "the softmax is left"),
        (sequences(average=False), "lacks the softmax's mean"),
        (sequences(only_chosen=True), "not chosen are missing"),
    ],
}
