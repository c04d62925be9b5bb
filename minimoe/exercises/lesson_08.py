"""Checks of lesson 08: load balancing."""

from __future__ import annotations

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure


def collapsed_score(answer: Answer) -> Report:
    """(E, K) → the balance loss when all tokens choose the same K experts."""
    return first_failure(_collapsed_score(answer, *case) for case in ((8, 3), (64, 6), (16, 1), (5, 5)))


def _collapsed_score(answer: Answer, experts: int, chosen: int) -> Report:
    right = experts / chosen
    hints = {
        "this is the form whose f adds up to K, but here f adds up to 1.": float(experts),
        "the product must be summed over the K experts that are used.": experts / chosen**2,
        "1 is the score of perfect balance.": 1.0,
        "this is one over the score.": 1 / right,
        "this is rounded down, but a score need not be a whole number.": float(experts // chosen),
        "this is E times f alone: multiply it by p̄ = 1/K too, and sum over K experts.": experts * chosen,
    }
    mistakes = {f"E = {experts}, K = {chosen}: {hint}": wrong for hint, wrong in hints.items() if wrong != right}
    return values(answer, (experts, chosen), {"score": right}, mistakes={"score": mistakes})


def bias_step(answer: Answer) -> Report:
    """(b, counts, gamma) → b moved by γ, so that experts below the mean load get more work."""
    # the first has an expert with exactly the mean load; in the second, the mean is 2.8 and the median 1.5
    return first_failure(_bias_step(answer, np.array(counts)) for counts in ([7, 1, 4, 2, 6], [10, 0, 3, 2, 1, 1]))


def _bias_step(answer: Answer, counts: Array) -> Report:
    rng = np.random.default_rng(8)
    b, gamma = rng.standard_normal(len(counts)), 0.03
    ahead = counts.mean() - counts
    return values(
        answer,
        (b, counts, gamma),
        {"b": b + gamma * np.sign(ahead)},
        sizes={"E": len(counts)},
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
                **_without(
                    b + gamma * np.sign(ahead),
                    {
                        "an expert with exactly the mean load does not move; here it becomes easier to choose.": (
                            b + gamma * np.where(ahead >= 0, 1, -1)
                        ),
                        "an expert with exactly the mean load does not move; here it becomes harder to choose.": (
                            b + gamma * np.where(ahead > 0, 1, -1)
                        ),
                        "this compares with the median load; compare with the mean.": (
                            b + gamma * np.sign(np.median(counts) - counts)
                        ),
                        "the mean load need not be a whole number: do not round it.": (
                            b + gamma * np.sign(np.round(counts.mean()) - counts)
                        ),
                        "the mean load need not be a whole number: do not round it down.": (
                            b + gamma * np.sign(np.floor(counts.mean()) - counts)
                        ),
                        "this compares with the mean load of the experts in use; an idle expert counts too.": (
                            b + gamma * np.sign(counts[counts > 0].mean() - counts)
                        ),
                    },
                ),
            }
        },
    )


def entropy_backward(answer: Answer) -> Report:
    """p → dc of Σ p̄ log p̄, with p̄ the mean over tokens of softmax(c)."""
    rng = np.random.default_rng(8)
    N, E = 6, 5
    c = rng.standard_normal((N, E))

    def loss(c: Array) -> Array:
        mean = _softmax(c).mean(0)
        return (mean * np.log(mean)).sum()

    p = _softmax(c)
    u = (np.log(p.mean(0)) + 1) / N

    def through_softmax(u: Array) -> Array:
        return p * (u - (p * u).sum(1, keepdims=True))

    return gradients(
        answer,
        (p,),
        loss,
        {"c": c},
        sizes={"N": N, "E": E},
        mistakes={
            "dc": {
                "this is the gradient with respect to p; the softmax is left.": np.tile(u, (N, 1)),
                "dc lacks the softmax's mean term: raising one logit lowers all other probabilities.": p * u,
                "this makes each token undecided by itself, but the loss has the mean over tokens inside the "
                "logarithm.": through_softmax(np.log(p) + 1) / N,
                "1/N from the mean over tokens is missing.": through_softmax(u) * N,
                "the mean of the softmax is over tokens, but each token has its own softmax.": (
                    p * (u - (p * u).sum(0))
                ),
                "the mean of the softmax must be weighted with p.": p * (u - u.mean()),
                "this goes the wrong way: p̄ log p̄ is the negative entropy.": -through_softmax(u),
            }
        },
    )


def sequence_balance_backward(answer: Answer) -> Report:
    """(p, chosen) → dc of the mean over sequences of E Σ f_e p̄_e, with f a constant."""
    rng = np.random.default_rng(8)
    B, T, E, K = 3, 7, 5, 2
    c = rng.standard_normal((B, T, E)) + rng.standard_normal((B, 1, E))
    chosen = np.argsort(-(c + 2 * rng.standard_normal(c.shape)), axis=2)[:, :, :K]  # noisy: not the top K of p
    one_hot = np.zeros((B, T, E))
    np.put_along_axis(one_hot, chosen, 1.0, axis=2)
    f = one_hot.sum(1, keepdims=True) / (T * K)  # (B, 1, E)

    def loss(c: Array) -> Array:
        return E * (f * _softmax(c).mean(1, keepdims=True)).sum() / B

    p = _softmax(c)

    def through_softmax(u: Array) -> Array:
        return p * (u - (p * u).sum(-1, keepdims=True))

    right = through_softmax(E * f / T / B)
    top = np.zeros((B, T, E))
    np.put_along_axis(top, np.argsort(-p, axis=2)[:, :, :K], 1.0, axis=2)
    first = np.eye(E)[chosen[:, :, 0]]
    seen = (f > 0).astype(float)
    once = "an indexed += counts an expert once, however often it is chosen: use np.add.at or np.bincount."
    return gradients(
        answer,
        (p, chosen),
        loss,
        {"c": c},
        sizes={"B": B, "T": T, "E": E, "K": K},
        mistakes={
            "dc": {
                "this is the loss of the whole batch, but every sequence has its own f.": (
                    through_softmax(E * f.mean(0) / T / B)
                ),
                "your f adds up to K, not to 1.": right * K,
                "this takes the top K of p, but the noise may have chosen others: use `chosen`.": (
                    through_softmax(E * top.mean(1, keepdims=True) / K / T / B)
                ),
                once: through_softmax(E * seen / (T * K) / T / B),
                once + " Then divide by T·K.": through_softmax(E * seen / seen.sum(2, keepdims=True) / T / B),
                "f is the first choices only, but a token chooses K experts.": (
                    through_softmax(E * first.mean(1, keepdims=True) / T / B)
                ),
                "the mean over the B sequences is missing.": right * B,
                "the mean over the T tokens of a sequence is missing.": right * T,
                "this is the gradient with respect to p; the softmax is left.": np.broadcast_to(E * f / T / B, p.shape),
                "dc lacks the softmax's mean term: raising one logit lowers all other probabilities.": (
                    p * (E * f / T / B)
                ),
                "the logits that were not chosen are missing: p̄ is the mean of the full softmax.": one_hot * right,
            }
        },
    )


def _without(right: Array, mistakes: dict[str, Array]) -> dict[str, Array]:
    """The mistakes that give another value than the right one in this case."""
    return {hint: wrong for hint, wrong in mistakes.items() if not np.array_equal(wrong, right)}


def _softmax(c: Array) -> Array:
    p = np.exp(c - c.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)
