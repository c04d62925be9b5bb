"""Wrong answers to the exercises of lesson 08, each with words that its hint must hold, and unusual right ones."""

from fractions import Fraction

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


def sequences(own=True, k=1, mean=True, tokens=True, softmax=True, average=True, only_chosen=False, choice=None):
    """The right gradient but for one thing."""

    def sequence_balance_backward(p, chosen):
        B, T, E = p.shape
        counts = np.stack([np.bincount(sequence.ravel(), minlength=E) for sequence in chosen])
        counts = counts if choice is None else choice(p, chosen)
        f = counts / (counts.sum(1, keepdims=True) if k == 1 else T)
        f = f if own else f.mean(0, keepdims=True)
        u = np.broadcast_to(E * f[:, None] / ((B if mean else 1) * (T if tokens else 1)), p.shape)
        if not softmax:
            return u
        dc = p * (u - average * (p * u).sum(2, keepdims=True))
        if only_chosen:
            mask = np.zeros_like(p)
            np.put_along_axis(mask, chosen, 1.0, axis=2)
            dc = mask * dc
        return dc

    return sequence_balance_backward


def top_of_p(p, chosen):
    K = chosen.shape[2]
    return (np.argsort(np.argsort(-p, axis=2), axis=2) < K).sum(1)


def each_once(p, chosen):
    counts = np.zeros((len(p), p.shape[2]))
    for b in range(len(p)):
        counts[b, chosen[b]] += 1
    return counts


def first_choices(p, chosen):
    return np.stack([np.bincount(sequence[:, 0], minlength=p.shape[2]) for sequence in chosen])


def each_once_by_all(p, chosen):
    (B, T, E), K = p.shape, chosen.shape[2]
    u = E * each_once(p, chosen)[:, None] / (T * K) / (B * T)
    return through_softmax(p, np.broadcast_to(u, p.shape))


def one_sequence_at_a_time(p, chosen):
    B, T, E = p.shape
    dc = np.zeros_like(p)
    for b in range(B):
        f = np.zeros(E)
        np.add.at(f, chosen[b].ravel(), 1 / chosen[b].size)
        for t in range(T):
            u = E * f / (B * T)
            dc[b, t] = p[b, t] * (u - p[b, t] @ u)
    return dc


def by_one_hot(p, chosen):
    B, T, E = p.shape
    f = (chosen[..., None] == np.arange(E)).mean((1, 2))
    return E / (B * T) * through_softmax(p, np.broadcast_to(f[:, None], p.shape))


def one_by_one(b, counts, gamma):
    fair = sum(counts) / len(counts)
    return [
        bias + gamma if count < fair else bias - gamma if count > fair else bias
        for bias, count in zip(b, counts, strict=True)
    ]


def by_two_masks(b, counts, gamma):
    return b + gamma * (counts * len(counts) < counts.sum()) - gamma * (counts * len(counts) > counts.sum())


def without_the_constant(p):
    """The 1 of the derivative cancels, because a softmax's gradient ignores what all entries share."""
    return through_softmax(p, np.log(p.mean(0))) / len(p)


def entropy_by_jacobian(p):
    u = (1 + np.log(p.sum(0) / len(p))) / len(p)
    return np.stack([(np.diag(row) - np.outer(row, row)) @ u for row in p])


WRONG = {
    check.collapsed_score: [
        (lambda E, K: E, "adds up to 1"),
        (lambda E, K: E / K**2, "summed over the K experts"),
        (lambda E, K: 1, "perfect balance"),
        (lambda E, K: K / E, "one over the score"),
        (lambda E, K: E // K, "rounded down"),
        (lambda E, K: E * K, "multiply it by p̄"),
    ],
    check.bias_step: [
        (bias_step(lambda ahead: -np.sign(ahead)), "wrong way"),
        (bias_step(lambda ahead: ahead), "same size γ"),
        (bias_step(lambda ahead: ahead / 20), "share of the load"),
        (bias_step(np.sign, old=False), "old b is missing"),
        (bias_step(lambda ahead: np.where(ahead >= 0, 1, -1)), "here it becomes easier to choose"),
        (bias_step(lambda ahead: np.where(ahead > 0, 1, -1)), "here it becomes harder to choose"),
        (lambda b, counts, gamma: b + gamma * np.sign(np.median(counts) - counts), "compare with the mean"),
        (lambda b, counts, gamma: b + gamma * np.sign(counts.sum() // len(b) - counts), "do not round it down"),
        (lambda b, counts, gamma: b + gamma * np.sign(round(counts.mean()) - counts), "do not round it."),
        (lambda b, counts, gamma: b + gamma * np.sign(4 - counts), ""),
        (lambda b, counts, gamma: b + gamma * np.sign(counts[counts > 0].mean() - counts), "idle expert counts too"),
    ],
    check.entropy_backward: [
        (by_p, "the softmax is left"),
        (no_mean, "lacks the softmax's mean"),
        (each_by_itself, "each token undecided by itself"),
        (sum_of_tokens, "1/N"),
        (maximised, "wrong way"),
        (lambda p: p * (by_p(p) - (p * by_p(p)).sum(0)), "over tokens"),
        (lambda p: p * (by_p(p) - by_p(p).mean()), "weighted with p"),
    ],
    check.sequence_balance_backward: [
        (sequences(own=False), "its own f"),
        (sequences(k=2), "adds up to K"),
        (sequences(mean=False), "B sequences is missing"),
        (sequences(tokens=False), "T tokens of a sequence is missing"),
        (sequences(softmax=False), "the softmax is left"),
        (sequences(average=False), "lacks the softmax's mean"),
        (sequences(only_chosen=True), "not chosen are missing"),
        (sequences(choice=top_of_p), "use `chosen`"),
        (sequences(choice=first_choices), "first choices only"),
        (sequences(choice=each_once), "Then divide by T·K"),
        (each_once_by_all, "counts an expert once"),
    ],
}

RIGHT = {
    check.collapsed_score: [lambda E, K: E * sum(1 / K * 1 / K for _ in range(K)), lambda E, K: Fraction(E, K)],
    check.bias_step: [one_by_one, by_two_masks],
    check.entropy_backward: [without_the_constant, entropy_by_jacobian],
    check.sequence_balance_backward: [one_sequence_at_a_time, by_one_hot],
}
