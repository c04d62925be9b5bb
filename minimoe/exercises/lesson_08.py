"""Checks of lesson 08: load balancing."""

from __future__ import annotations

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure


def collapsed_score(answer: Answer) -> Report:
    """(E, K) → the balance loss when all tokens choose the same K experts."""
    return first_failure(_collapsed_score(answer, *case) for case in ((8, 2), (64, 8), (16, 1), (5, 5)))


def _collapsed_score(answer: Answer, experts: int, chosen: int) -> Report:
    right = experts / chosen
    hints = {
        "this is the form whose f adds up to K, but here f adds up to 1.": float(experts),
        "the product must be summed over the K experts that are used.": experts / chosen**2,
        "1 is the score of perfect balance.": 1.0,
        "this is one over the score.": 1 / right,
    }
    mistakes = {f"E = {experts}, K = {chosen}: {hint}": wrong for hint, wrong in hints.items() if wrong != right}
    return values(answer, (experts, chosen), {"score": right}, mistakes={"score": mistakes})


def bias_step(answer: Answer) -> Report:
    """(b, counts, gamma) → b moved by γ, so that experts below the mean load get more work."""
    rng = np.random.default_rng(8)
    b, gamma = rng.standard_normal(5), 0.03
    counts = np.array([7, 1, 4, 0, 8])  # the third has exactly the mean
    ahead = counts.mean() - counts
    return values(
        answer,
        (b, counts, gamma),
        {"b": b + gamma * np.sign(ahead)},
        sizes={"E": 5},
        mistakes={
            "b": {
                "this goes the wrong way: an expert with too little work must become easier to choose.": (
                    b - gamma * np.sign(ahead)
                ),
                "every step has the same size γ; only its direction comes from the load.": b + gamma * ahead,
                "every step has the same size γ; only its direction comes from the share of the load.": (
                    b + gamma * ahead / counts.sum()
                ),
                "this is the step alone; the old b is missing.": gamma * np.sign(ahead),
                "an expert with exactly the mean load does not move.": b + gamma * np.where(ahead >= 0, 1, -1),
                "an expert with exactly the mean load stays where it is.": b + gamma * np.where(ahead > 0, 1, -1),
            }
        },
    )


def entropy_backward(answer: Answer) -> Report:
    """p → dz of Σ p̄ log p̄, with p̄ the mean over tokens of softmax(z)."""
    rng = np.random.default_rng(8)
    N, E = 6, 5
    z = rng.standard_normal((N, E))

    def loss(z: Array) -> Array:
        mean = _softmax(z).mean(0)
        return (mean * np.log(mean)).sum()

    p = _softmax(z)
    u = (np.log(p.mean(0)) + 1) / N

    def through_softmax(u: Array) -> Array:
        return p * (u - (p * u).sum(1, keepdims=True))

    return gradients(
        answer,
        (p,),
        loss,
        {"z": z},
        sizes={"N": N, "E": E},
        mistakes={
            "dz": {
                "this is the gradient with respect to p; the softmax is left.": np.tile(u, (N, 1)),
                "dz lacks the softmax's mean term: raising one logit lowers all other probabilities.": p * u,
                "this makes each token undecided by itself, but the loss has the mean over tokens inside the "
                "logarithm.": through_softmax(np.log(p) + 1) / N,
                "1/N from the mean over tokens is missing.": through_softmax(u) * N,
                "this goes the wrong way: p̄ log p̄ is the negative entropy.": -through_softmax(u),
            }
        },
    )


def sequence_balance_backward(answer: Answer) -> Report:
    """(p, chosen) → dz of the mean over sequences of E Σ f_e p̄_e, with f a constant."""
    rng = np.random.default_rng(8)
    B, T, E, K = 3, 6, 5, 4
    z = rng.standard_normal((B, T, E)) + rng.standard_normal((B, 1, E))
    chosen = np.argsort(-z, axis=2)[:, :, :K]  # held fixed: no finite difference can flip it
    one_hot = np.zeros((B, T, E))
    np.put_along_axis(one_hot, chosen, 1.0, axis=2)
    f = one_hot.sum(1, keepdims=True) / (T * K)  # (B, 1, E)

    def loss(z: Array) -> Array:
        return E * (f * _softmax(z).mean(1, keepdims=True)).sum() / B

    p = _softmax(z)

    def through_softmax(u: Array) -> Array:
        return p * (u - (p * u).sum(-1, keepdims=True))

    right = through_softmax(E * f / T / B)
    return gradients(
        answer,
        (p, chosen),
        loss,
        {"z": z},
        sizes={"B": B, "T": T, "E": E, "K": K},
        mistakes={
            "dz": {
                "this is the loss of the whole batch, but every sequence has its own f.": (
                    through_softmax(E * f.mean(0) / T / B)
                ),
                "your f adds up to K, not to 1.": right * K,
                "the mean over the B sequences is missing.": right * B,
                "the mean over the T tokens of a sequence is missing.": right * T,
                "this is the gradient with respect to p; the softmax is left.": np.broadcast_to(E * f / T / B, p.shape),
                "dz lacks the softmax's mean term: raising one logit lowers all other probabilities.": (
                    p * (E * f / T / B)
                ),
                "the logits that were not chosen are missing: p̄ is the mean of the full softmax.": one_hot * right,
            }
        },
    )


def _softmax(z: Array) -> Array:
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)
